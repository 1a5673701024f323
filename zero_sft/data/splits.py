"""Which files of a folder are for training, where it has several splits, as datasets of the hub are laid out. Pure, but for a
README.

`data/train-00000-of-00002.parquet` names its split, as do `train.jsonl`, `my_test.json`, and folders `train/` and `test/`:
the rules are those of the library `datasets`. What is held out must not be trained on because it is in the same folder.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zero_sft.errors import DataError

TRAIN = "train"

_KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The files of a folder that are read, and a line for the log where others are not, or may not have been meant."""

    files: tuple[Path, ...]
    note: str = ""
    held_out: str | None = None  # a split that is left out, though nobody has named another


def choose_split(folder: Path, files: Sequence[Path], wanted: str | None) -> Chosen:
    """The files of the split that is `wanted`; where none is named, `train` where there are several.

    Raises:
        DataError: no such split; several splits without a `train`; or several configurations.
    """
    declared = _declared(folder)
    names = {file: split_of(file.relative_to(folder).as_posix(), declared) for file in files}
    counts = Counter(names.values())
    splits = sorted(name for name in counts if name is not None)
    if wanted is not None:
        split = wanted if wanted in splits else _keyword(wanted) or wanted
        if split not in splits:
            has = f"its splits are {', '.join(splits)}" if splits else "no name of a file or folder in it tells a split"
            raise DataError(
                f"{folder} has no split {wanted!r}: {has}. Check --data_path and --eval_data_path.", code="data.no_such_split"
            )
        return Chosen(files=tuple(file for file in files if names[file] == split))
    held_out = [name for name in splits if _keyword(name) not in (None, TRAIN)]
    if len(splits) > 1 and TRAIN in splits:
        return _without(folder, names, {TRAIN})
    if len(splits) > 1 and any(_keyword(name) for name in splits):
        example = next((name for name in splits if _keyword(name) == TRAIN), splits[0])
        raise DataError(
            f"{folder} has the splits {', '.join(splits)}, and none is called {TRAIN}. Name one of them: {folder}:{example}.",
            code="data.no_train_split",
        )
    if held_out and None in counts:
        return _without(folder, names, {None})
    note = f"splits {', '.join(splits)}: all are read; name one as {folder}:{splits[0]}" if len(splits) > 1 else ""
    return Chosen(files=tuple(files), note=note)


def _without(folder: Path, names: Mapping[Path, str | None], taken: set[str | None]) -> Chosen:
    """The files of some splits, and what is left out."""
    counts = Counter(name or "without a split's name" for name in names.values() if name not in taken)
    left = ", ".join(f"{name} ({count} file{'s' * (count != 1)})" for name, count in sorted(counts.items()))
    which = f"split {TRAIN}" if TRAIN in taken else "files that name no split"
    files = tuple(file for file, name in names.items() if name in taken)
    example = next((name for name in names.values() if name not in taken and name), TRAIN)
    note = f"{which} read; left out: {left}. Name another as {folder}:{example}"
    return Chosen(files=files, note=note, held_out=example)


def split_of(name: str, declared: Sequence[tuple[str, str]] = ()) -> str | None:
    """The split that a file's path inside its folder names; None if it names none.

    `declared`: pairs of a split and a pattern of paths, which decide where there are any.

    Worked example: data/train_sft-00000-of-00003.parquet → train_sft; my_dev.jsonl → validation; chats.json → None.
    """
    if declared:
        return next((split for split, pattern in declared if fnmatch.fnmatch(name, pattern)), None)
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


def _declared(folder: Path) -> list[tuple[str, str]]:
    """Pairs of a split and a pattern of paths that the folder's README declares, as the hub reads it.

    Raises:
        DataError: several configurations.
    """
    configs = [each for each in _front_matter(folder / "README.md").get("configs") or [] if isinstance(each, Mapping)]
    if len(configs) > 1:
        names = [str(each.get("config_name")) for each in configs]
        raise DataError(
            f"{folder} has several configurations, as its README.md says: {', '.join(names)}. Name the folder or the files of "
            "one.",
            code="data.several_configurations",
        )
    files = configs[0].get("data_files") if configs else None
    if isinstance(files, str):
        files = [{"split": TRAIN, "path": files}]
    pairs = []
    for each in files if isinstance(files, list) else []:
        split, paths = (each.get("split"), each.get("path")) if isinstance(each, Mapping) else (TRAIN, each)
        pairs += [(str(split), str(path)) for path in (paths if isinstance(paths, list) else [paths])]
    return pairs


def _front_matter(readme: Path) -> Mapping[str, Any]:
    """The YAML at the beginning of a README; nothing where there is none that can be read."""
    import yaml

    try:
        lines = readme.read_text(encoding="utf-8-sig").split("\n---", 1)
        found = yaml.safe_load(lines[0].removeprefix("---")) if lines[0].startswith("---") and len(lines) > 1 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}
