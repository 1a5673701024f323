"""Choose the files of one split in a folder that is laid out like a dataset on the hub. Pure.

If a README declares files, only these belong to the dataset (`declared_files`). Otherwise the names tell the split, by the
rules of the library `datasets`: `data/train-00000-of-00002.parquet`, `train.jsonl`, `my_test.json`, folders `train/` and
`test/`. Held-out data must not be trained on just because it is in the same folder.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from zero_sft.data.sources.declared_files import TRAIN, DeclaredFiles
from zero_sft.errors import DataError
from zero_sft.printable import excerpt, with_count

_KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
_WORD_SEPARATORS = re.compile(r"[-._ 0-9]+")

File = TypeVar("File")
"""A file: a local path or a remote file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSplit(Generic[File]):
    """The files to read; `left_out` are names of files in the folder that are not data.

    `note` is a line for the log if splits are left out or if several are read. `held_out` is a split that is left out by
    default, since the user has not named one.
    """

    files: tuple[File, ...] = ()
    note: str = ""
    held_out: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits(Generic[File]):
    """The files of each split; the key None holds files that belong to no split.

    `undeclared` counts the files that the README, `source`, does not declare. `unmatched` lists, for each split, the patterns
    that match no file.
    """

    files: Mapping[str | None, Sequence[File]]
    undeclared: int = 0
    unmatched: Mapping[str | None, Sequence[str]] = field(default_factory=dict)
    source: Path | None = None


def choose_split(
    folder: str, files: Mapping[str, File], declared: DeclaredFiles | None, requested: str | None
) -> ChosenSplit[File]:
    """Return the files of the `requested` split; if it is None and there are several splits, those of `train`.

    Args:
        folder: its name for messages.
        files: the data files in and below it, by their path inside it.
        declared: the files that its README declares.

    Raises:
        DataError: no such split; several splits without a `train`; several configurations; an invalid README, or one that
            declares missing files.
    """
    by_split = _group_by_split(files, declared)
    splits = sorted(name for name in by_split.files if name is not None)
    if requested is not None:
        split = requested if requested in splits else _keyword(requested) or requested
        if split not in splits:
            has = f"its splits are {', '.join(splits)}" if splits else "no file or folder name in it names a split"
            raise DataError(
                f"{folder} has no split {requested!r}: {has}. Check --data_path and --eval_data_path.",
                code="data.no_such_split",
            )
        return replace(_select(folder, by_split, {split}), note="", held_out=None)
    if len(splits) > 1 and TRAIN in splits:
        return _select(folder, by_split, {TRAIN})
    if len(splits) > 1 and any(_keyword(name) for name in splits):
        example = next((name for name in splits if _keyword(name) == TRAIN), splits[0])
        raise DataError(
            f"{folder} has the splits {', '.join(splits)}; expected one called {TRAIN}. Name the one to read, for example "
            f"{folder}:{example}.",
            code="data.no_train_split",
        )
    if None in by_split.files and any(_keyword(name) not in (None, TRAIN) for name in splits):
        return _select(folder, by_split, {None})
    chosen = _select(folder, by_split, set(by_split.files))
    if len(splits) > 1:
        return replace(chosen, note=f"splits {', '.join(splits)}: all are read; name one as {folder}:{splits[0]}")
    return chosen


def _group_by_split(by_name: Mapping[str, File], declared: DeclaredFiles | None) -> _Splits[File]:
    """Group the files by split: as the README declares them, otherwise by their names."""
    if declared is None or not declared.patterns:
        top = declared.data_dir if declared else ""
        by_split = defaultdict[str | None, list[File]](list)
        for name, file in by_name.items():
            if PurePosixPath(name).is_relative_to(top):
                by_split[split_of(PurePosixPath(name).relative_to(top).as_posix())].append(file)
        found = sum(map(len, by_split.values()))
        return _Splits(
            files=by_split or {None: []},
            undeclared=len(by_name) - found,
            unmatched={} if found else {None: [f"{top}/"]},
            source=declared and declared.source,
        )
    by_split, unmatched = {}, {}
    for split in declared.patterns:
        names_of = declared.files_of(split, list(by_name))
        unmatched[split] = [pattern for pattern, names in names_of.items() if not names]
        declared_names = set(chain.from_iterable(names_of.values()))
        by_split[split] = [file for name, file in by_name.items() if name in declared_names]
    undeclared = len(set(by_name.values()).difference(*by_split.values()))
    return _Splits(files=by_split, undeclared=undeclared, unmatched=unmatched, source=declared.source)


def _select(folder: str, by_split: _Splits[File], selected: set[str | None]) -> ChosenSplit[File]:
    """Take the files of the selected splits, unless a declared one is missing, and note for the log what is left out."""
    missing = [pattern for split in by_split.files if split in selected for pattern in by_split.unmatched.get(split, ())]
    if missing:
        listed = ", ".join(excerpt(repr(pattern)) for pattern in missing)
        raise DataError(
            f"{by_split.source} declares {listed}, but {folder} has no .json, .jsonl or .parquet file of "
            "that name. Download it, or repair the README.",
            code="data.declared_files_missing",
        )
    others = {split or "without a split's name": len(files) for split, files in by_split.files.items() if split not in selected}
    if by_split.undeclared:
        others[f"not declared in {by_split.source.name if by_split.source else ''}"] = by_split.undeclared
    files = tuple(sorted({file for split in selected for file in by_split.files[split]}, key=str))
    if not others:
        return ChosenSplit(files=files)
    left_out = ", ".join(f"{name} ({with_count(count, 'file')})" for name, count in sorted(others.items()))
    names = sorted(name for name in selected if name)
    what = f"split{'s' * (len(names) > 1)} {', '.join(names)}" if names else "files that name no split"
    example = next((split for split in by_split.files if split not in selected and split), None)
    remedy = f". Name another as {folder}:{example or TRAIN}" if len(others) > bool(by_split.undeclared) else ""
    return ChosenSplit(files=files, note=f"{what} read; left out: {left_out}{remedy}", held_out=example)


def split_of(name: str) -> str | None:
    """Return the split that a file's path inside its folder names; None if it names no split.

    Worked example: data/train_sft-00000-of-00003.parquet → train_sft; my_dev.jsonl → validation; chats.json → None.
    """
    *folders, file = PurePosixPath(name).parts
    if shard := _SHARD.match(file):
        return _synonym(shard["split"]) or shard["split"]
    return next(filter(None, map(_keyword, (file, *reversed(folders)))), None)


def _synonym(word: str) -> str | None:
    """Return the split that a whole word is a name of: "dev" → validation."""
    return next((split for split, words in _KEYWORDS.items() if word.lower() in words), None)


def _keyword(name: str) -> str | None:
    """Return the split that one of the words of a name stands for: "my_dev.jsonl" → validation."""
    words = set(_WORD_SEPARATORS.split(name.lower()))
    parts = words | {part for word in words for part in word.split("_")}
    return next((split for split, keywords in _KEYWORDS.items() if parts & set(keywords)), None)
