"""The files of a folder that are for training, where it has several splits, as datasets of the hub are laid out. Pure, except
for reading a README.

Where a README declares files, these are the dataset (`declared`). Else `data/train-00000-of-00002.parquet` names its split, as
do `train.jsonl`, `my_test.json`, and folders `train/` and `test/`: the rules are those of the library `datasets`. What is held
out must not be trained on because it is in the same folder.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from zero_sft.data.sources.declared_files import TRAIN, declared_in
from zero_sft.errors import DataError
from zero_sft.printable import on_one_line

_KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSplit:
    """The files of a folder that are read, and a line for the log where others are not, or may not have been meant."""

    files: tuple[Path, ...]
    note: str = ""
    held_out: str | None = None  # a split that is left out, though nobody has named another


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits:
    """The files of each split, those under None being of none; and how many a README leaves out.

    `unmatched`: patterns of a split for which there are no files.
    """

    files: Mapping[str | None, Sequence[Path]]
    undeclared: int = 0
    unmatched: Mapping[str | None, Sequence[str]] = field(default_factory=dict)
    source: Path | None = None


def choose_split(folder: Path, files: Sequence[Path], wanted: str | None) -> ChosenSplit:
    """The files of the split that is `wanted`; where none is named, `train` where there are several.

    Raises:
        DataError: no such split; several splits without a `train`; several configurations; a README that can't be understood,
            or declares files that are not there.
    """
    found = _splits(folder, files)
    splits = sorted(name for name in found.files if name is not None)
    if wanted is not None:
        split = wanted if wanted in splits else _keyword(wanted) or wanted
        if split not in splits:
            has = f"its splits are {', '.join(splits)}" if splits else "no name of a file or folder in it tells a split"
            raise DataError(
                f"{folder} has no split {wanted!r}: {has}. Check --data_path and --eval_data_path.", code="data.no_such_split"
            )
        return replace(_taken(folder, found, {split}), note="", held_out=None)
    if len(splits) > 1 and TRAIN in splits:
        return _taken(folder, found, {TRAIN})
    if len(splits) > 1 and any(_keyword(name) for name in splits):
        example = next((name for name in splits if _keyword(name) == TRAIN), splits[0])
        raise DataError(
            f"{folder} has the splits {', '.join(splits)}, and none is called {TRAIN}. Name one of them: {folder}:{example}.",
            code="data.no_train_split",
        )
    if None in found.files and any(_keyword(name) not in (None, TRAIN) for name in splits):
        return _taken(folder, found, {None})
    chosen = _taken(folder, found, set(found.files))
    if len(splits) > 1:
        return replace(chosen, note=f"splits {', '.join(splits)}: all are read; name one as {folder}:{splits[0]}")
    return chosen


def _splits(folder: Path, files: Sequence[Path]) -> _Splits:
    """The files of each split: as a README declares them, or as their names tell."""
    declared = declared_in(folder)
    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    if declared is None or not declared.patterns:
        top = declared.data_dir if declared else ""
        inside = {name: file for name, file in by_name.items() if PurePosixPath(name).is_relative_to(top)}
        named = defaultdict[str | None, list[Path]](list)
        for name, file in inside.items():
            named[split_of(PurePosixPath(name).relative_to(top).as_posix())].append(file)
        unmatched: dict[str | None, list[str]] = {} if inside else {None: [f"{top}/"]}
        return _Splits(
            files=named or {None: []},
            undeclared=len(files) - len(inside),
            unmatched=unmatched,
            source=declared and declared.source,
        )
    matched = {split: declared.files_of(split, list(by_name)) for split in declared.patterns}
    taken = {split: {name for names in found.values() for name in names} for split, found in matched.items()}
    return _Splits(
        files={split: [file for name, file in by_name.items() if name in taken[split]] for split in matched},
        undeclared=len(set(by_name).difference(*taken.values())),
        unmatched={split: [pattern for pattern, names in found.items() if not names] for split, found in matched.items()},
        source=declared.source,
    )


def _taken(folder: Path, found: _Splits, taken: set[str | None]) -> ChosenSplit:
    """The files of some splits, and what is left out.

    Raises:
        DataError: a README that declares a file of these splits that is not there.
    """
    missing = [pattern for split in found.files if split in taken for pattern in found.unmatched.get(split, ())]
    if missing:
        listed = ", ".join(on_one_line(repr(pattern)) for pattern in missing)
        raise DataError(
            f"{found.source} declares {listed}, and {folder} has no .json, .jsonl or .parquet file of "
            "that name. Download it, or repair the README.",
            code="data.declared_files_missing",
        )
    others = {name or "without a split's name": len(files) for name, files in found.files.items() if name not in taken}
    if found.undeclared:
        others[f"not declared in {found.source.name if found.source else ''}"] = found.undeclared
    files = tuple(sorted({file for name in taken for file in found.files[name]}))
    if not others:
        return ChosenSplit(files=files)
    left = ", ".join(f"{name} ({count} file{'s' * (count != 1)})" for name, count in sorted(others.items()))
    names = sorted(name for name in taken if name)
    which = f"split{'s' * (len(names) > 1)} {', '.join(names)}" if names else "files that name no split"
    example = next((name for name in found.files if name not in taken and name), None)
    remedy = f". Name another as {folder}:{example or TRAIN}" if len(others) > bool(found.undeclared) else ""
    return ChosenSplit(files=files, note=f"{which} read; left out: {left}{remedy}", held_out=example)


def split_of(name: str) -> str | None:
    """The split that a file's path inside its folder names; None if it names none.

    Worked example: data/train_sft-00000-of-00003.parquet → train_sft; my_dev.jsonl → validation; chats.json → None.
    """
    *folders, file = PurePosixPath(name).parts
    if shard := _SHARD.match(file):
        return _exactly(shard["split"]) or shard["split"]
    return next(filter(None, map(_keyword, (file, *reversed(folders)))), None)


def _exactly(word: str) -> str | None:
    return next((split for split, words in _KEYWORDS.items() if word.lower() in words), None)


def _keyword(name: str) -> str | None:
    """The split that is a word of a name."""
    words = set(_BETWEEN_WORDS.split(name.lower()))
    parts = words | {part for word in words for part in word.split("_")}
    return next((split for split, known in _KEYWORDS.items() if parts & set(known)), None)
