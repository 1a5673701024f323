"""The files that a dataset's README.md declares, as the hub and the library `datasets` read it.

The YAML at the beginning of a README may name the files of each split: `configs`, with `data_files` or `data_dir`. A file that
is not declared there is not a part of the dataset. huggingface_hub reads the YAML, and fsspec translates the patterns, as
`datasets` has them do. `datasets.data_files.resolve_pattern` itself was left out: it takes `[` in the folder's own name for a
pattern, and follows a URL into the network.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zero_sft.data.sources.text_io import readable
from zero_sft.errors import DataError
from zero_sft.printable import on_one_line

README, _YAML = "README.md", ".huggingface.yaml"
TRAIN = "train"
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_REMEDY = "Repair it, or remove the file and name the data by its path."
_LOOKS = "a path, a list of paths, or a list of {split: ..., path: ...}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredFiles:
    """A README's one configuration: the patterns of each split, and the folder that all files are in ("": no such one).

    Without `patterns` the names of the files in `data_dir` tell their splits.
    """

    source: Path
    data_dir: str = ""
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def files_of(self, split: str, names: Sequence[str]) -> dict[str, list[str]]:
        """The files that each pattern of a split matches; `names` are the paths of all files inside the dataset's folder."""
        return {pattern: _matching(posixpath.join(self.data_dir, pattern), names) for pattern in self.patterns[split]}


def declared_in(folder: Path) -> DeclaredFiles | None:
    """The files that a folder's README declares; None where it declares none.

    Raises:
        DataError: YAML that can't be understood, or several configurations.
    """
    source, metadata = _metadata(folder)
    configs = metadata.get("configs")
    if configs is None or configs == []:
        return None
    if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs):
        raise _not_understood(source, "configs", configs, "a list of configurations, with config_name and data_files")
    if len(configs) > 1:
        names = ", ".join(on_one_line(config.get("config_name")) for config in configs)
        raise DataError(
            f"{folder} has several configurations, as its {source.name} says: {names}. Name the folder or the files of one.",
            code="data.several_configurations",
        )
    (config,) = configs
    data_dir, files = config.get("data_dir"), config.get("data_files")
    if data_dir is None and files is None:
        return None
    return DeclaredFiles(
        source=source,
        data_dir="" if data_dir is None else _inside(data_dir, source, "data_dir"),
        patterns={} if files is None else _patterns(files, source),
    )


def _patterns(files: Any, source: Path) -> dict[str, tuple[str, ...]]:
    """The patterns of each split; paths without a split are those of `train`."""
    given = [files] if isinstance(files, str) else files
    if not isinstance(given, list) or not given:
        raise _not_understood(source, "data_files", files, _LOOKS)
    if all(isinstance(path, str) for path in given):
        return {TRAIN: tuple(_inside(path, source, "data_files") for path in given)}
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in given:
        if not isinstance(entry, Mapping) or set(entry) != {"split", "path"}:
            raise _not_understood(source, "data_files", entry, _LOOKS)
        split, paths = entry["split"], entry["path"]
        if not isinstance(split, str) or not _SPLIT_NAME.fullmatch(split) or split in patterns:
            raise _not_understood(source, "split", split, "a name of letters, digits and _, once")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not paths:
            raise _not_understood(source, "path", paths, "a path or a list of paths")
        patterns[split] = tuple(_inside(path, source, "path") for path in paths)
    return patterns


def _inside(path: Any, source: Path, key: str) -> str:
    """A path in its shortest form, if it is one inside the folder that can be matched."""
    from fsspec.utils import glob_translate

    normal = posixpath.normpath(path) if isinstance(path, str) and path and "://" not in path else ".."
    if normal == ".." or normal.startswith(("/", "../")):
        raise _not_understood(source, key, path, "a path inside the folder")
    normal = "" if normal == "." else normal
    try:
        re.compile(glob_translate(normal))
    except (ValueError, re.error) as error:
        raise _not_understood(source, key, path, "a pattern in which ** stands alone between slashes") from error
    return normal


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern matches, as in `datasets`: `*` stays within a folder; folders like `__old__` must be named."""
    from fsspec.utils import glob_translate

    expression, special = re.compile(glob_translate(pattern)), _special_folders(pattern)
    return [name for name in names if expression.match(name) and _special_folders(name) == special]


def _special_folders(path: str) -> int:
    return sum(part.startswith("__") for part in PurePosixPath(path).parent.parts)


def _metadata(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The YAML of the README, with that of `.huggingface.yaml` over it, and the file that has the configurations."""
    import yaml
    from huggingface_hub import metadata_load

    readme, alone = folder / README, folder / _YAML
    source, found = readme, {}
    try:
        if readme.is_file():
            with readable(readme, argument="its rights"):
                found = metadata_load(str(readme)) or {}
        if alone.is_file():
            source = alone
            with readable(alone, argument="its rights"):
                more = yaml.safe_load(alone.read_text(encoding="utf-8")) or {}
            if not isinstance(more, Mapping):
                raise _not_understood(alone, "YAML", more, "keys and values")
            source = alone if "configs" in more else readme
            found = {**found, **more}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1} of the YAML" if place else ""
        raise DataError(
            f"{source}{line}: not usable as YAML, so it can't be told which files are for training. {_REMEDY}",
            code="data.readme_not_understood",
        ) from error
    return source, found


def _not_understood(source: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"{source}: `{key}` must be {expected}; got {on_one_line(repr(value))}. {_REMEDY}", code="data.readme_not_understood"
    )
