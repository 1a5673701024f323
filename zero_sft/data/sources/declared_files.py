"""Read the files that a dataset's README.md declares, as the hub and the library `datasets` do.

The YAML at the beginning of a README may name the files of each split: `configs`, with `data_files` or `data_dir`. Files that
are not declared there are not part of the dataset. As in `datasets`, huggingface_hub reads the YAML and fsspec translates the
patterns. `datasets.data_files.resolve_pattern` was left out: it treats `[` in the folder's name as a pattern, and it follows
URLs into the network.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zero_sft.data.sources.text_io import readable
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

README, YAML = "README.md", ".huggingface.yaml"
TRAIN = "train"
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_REMEDY = "Repair it, or remove that file and name the data files by their paths."
_DATA_FILES_FORMS = "a path, a list of paths, or a list of {split: ..., path: ...}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredFiles:
    """The single configuration of a README: the file patterns of each split, below `data_dir` ("": the dataset's folder).

    Without `patterns`, the splits follow from the names of the files in `data_dir`.
    """

    source: Path
    data_dir: str = ""
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def files_of(self, split: str, names: Sequence[str]) -> dict[str, list[str]]:
        """Match each pattern of a split with `names`, the paths of all files relative to the dataset's folder."""
        return {pattern: _matching(posixpath.join(self.data_dir, pattern), names) for pattern in self.patterns[split]}


def declared_in(folder: Path, *, shown: str = "") -> DeclaredFiles | None:
    """Read the files that a folder's README declares; None if it declares none. `shown` is the folder's name for messages.

    Raises:
        DataError: invalid YAML, or several configurations.
    """
    source, metadata = _read_metadata(folder)
    configs = metadata.get("configs")
    if configs is None or configs == []:
        return None
    if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs):
        raise _not_understood(source, "configs", configs, "a list of configurations, with config_name and data_files")
    if len(configs) > 1:
        names = ", ".join(excerpt(config.get("config_name")) for config in configs)
        raise DataError(
            f"{shown or folder} has several configurations according to its {source.name}: {names}. Name the folder or the "
            "files of one configuration.",
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
    """Return the patterns of each split; paths without a split belong to `train`."""
    entries = [files] if isinstance(files, str) else files
    if not isinstance(entries, list) or not entries:
        raise _not_understood(source, "data_files", files, _DATA_FILES_FORMS)
    if all(isinstance(path, str) for path in entries):
        return {TRAIN: tuple(_inside(path, source, "data_files") for path in entries)}
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != {"split", "path"}:
            raise _not_understood(source, "data_files", entry, _DATA_FILES_FORMS)
        split, paths = entry["split"], entry["path"]
        if not isinstance(split, str) or not _SPLIT_NAME.fullmatch(split) or split in patterns:
            raise _not_understood(source, "split", split, "a unique name of letters, digits and _")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not paths:
            raise _not_understood(source, "path", paths, "a path or a list of paths")
        patterns[split] = tuple(_inside(path, source, "path") for path in paths)
    return patterns


def _inside(path: Any, source: Path, key: str) -> str:
    """Normalise a path or pattern; reject one that leads out of the folder or can't be matched."""
    from fsspec.utils import glob_translate

    normalised = posixpath.normpath(path) if isinstance(path, str) and path and "://" not in path else ".."
    if normalised == ".." or normalised.startswith(("/", "../")):
        raise _not_understood(source, key, path, "a path inside the folder")
    normalised = "" if normalised == "." else normalised
    try:
        re.compile(glob_translate(normalised))
    except (ValueError, re.error) as error:
        raise _not_understood(source, key, path, "a pattern in which ** stands alone between slashes") from error
    return normalised


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that match, as in `datasets`: `*` stays within a folder; folders like `__old__` must be named."""
    from fsspec.utils import glob_translate

    expression, dunder_folders = re.compile(glob_translate(pattern)), _count_dunder_folders(pattern)
    return [name for name in names if expression.match(name) and _count_dunder_folders(name) == dunder_folders]


def _count_dunder_folders(path: str) -> int:
    return sum(part.startswith("__") for part in PurePosixPath(path).parent.parts)


def _read_metadata(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Read the README's YAML, overridden by `.huggingface.yaml`; return the file with the configurations, and the keys."""
    import yaml
    from huggingface_hub import metadata_load

    readme, override = folder / README, folder / YAML
    source, metadata = readme, {}
    try:
        if readme.is_file():
            with readable(readme, argument="its permissions"):
                metadata = metadata_load(str(readme)) or {}
        if override.is_file():
            source = override
            with readable(override, argument="its permissions"):
                overriding = yaml.safe_load(override.read_text(encoding="utf-8")) or {}
            if not isinstance(overriding, Mapping):
                raise _not_understood(override, "YAML", overriding, "keys and values")
            source = override if "configs" in overriding else readme
            metadata = {**metadata, **overriding}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1} of the YAML" if mark else ""
        raise DataError(
            f"{source}{line}: invalid YAML, so the files for training are unknown. {_REMEDY}",
            code="data.readme_not_understood",
        ) from error
    return source, metadata


def _not_understood(source: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"{source}: `{key}` must be {expected}; got {excerpt(repr(value))}. {_REMEDY}", code="data.readme_not_understood"
    )
