"""Local files and folders as sources of objects: the files to read, and what identifies their contents."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from zero_sft.data.sources.declared_files import DeclaredFiles, declared_in
from zero_sft.data.sources.objects import DATA_OPTIONS, PARQUET, TABLES, ending_of, read_files
from zero_sft.data.sources.splits import ChosenSplit, File, choose_split
from zero_sft.data.sources.text_io import COMPRESSED, readable
from zero_sft.errors import DataError

_TEXTS = (".json", ".jsonl", *TABLES)
_ENDINGS = (*_TEXTS, PARQUET, *(text + compressed for text in _TEXTS for compressed in COMPRESSED))

_END_BYTES = 2**20
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the library `datasets` writes next to the data."""

_MODEL_FILES = frozenset(
    f"{name}.json"
    for name in (
        *("config", "generation_config", "adapter_config", "preprocessor_config", "processor_config", "trainer_state"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab"),
        *("model.safetensors.index", "pytorch_model.bin.index"),
    )
)
"""Files that transformers and the Trainer write into the folder of a model or of a run."""


def is_named_as_data(path: PurePath) -> bool:
    """Whether a file is a data file, judged by its name."""
    return path.name.lower().endswith(_ENDINGS) and path.name not in _ABOUT_DATA


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """A file, or one split of a folder of files, as a source of objects; for `split` see `choose_split`."""

    path: Path
    split: str | None = None

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{self.path}:{self.split}" if self.split else str(self.path)

    def chosen(self) -> ChosenSplit[Path]:
        """Choose the files to read: the path itself, or all data files of one split in and below a folder, sorted.

        Raises:
            DataError: a folder without data files, or one whose split is ambiguous.
        """
        if self.path.is_dir():
            return _chosen_in(self.path, self.split)
        if self.path.exists() and not self.path.is_file():
            raise DataError(
                f"{self.path} is a pipe or a device, which can't be read twice; expected a file. Write the data to a file.",
                code="data.not_a_regular_file",
            )
        return ChosenSplit(files=(self.path,))

    def objects(self, *, start: int = 0, streaming: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield each object of all files from number `start` on with its place, as `read_objects` does."""
        yield from read_files(self.chosen().files, start)

    def identity(self) -> list[Any]:
        """Return JSON-able digests of the files' contents; they do not depend on the folder or on dates."""
        return [_digest(file) for file in self.chosen().files]

    def state(self) -> list[Any]:
        """Return values that change when the files are written to, without reading the files; raises `DataError`."""
        return [(file, _stat(file)) for file in self.chosen().files]

    def state_of_local_files(self) -> list[Any]:
        """Return `state`; of other sources, there is nothing to compare."""
        return self.state()

    def fingerprint(self) -> list[Any]:
        """Return JSON-able names, sizes and checksums of the ends of the files.

        They tell a run that is resumed whether the data is the same, without reading all of it.
        """
        return [[file.name, _stat(file)[2], *_checksums(file)] for file in self.chosen().files]

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Raise an error with that code if files written below `root`, the value of `option`, would be read as data."""
        folder, target = self.path.resolve(), root.resolve()
        if not folder.is_dir() or not target.is_relative_to(folder):
            return
        if not any(part.startswith(".") for part in target.relative_to(folder).parts):  # hidden files are not read
            raise DataError(
                f"{option} {root} is inside the data folder {self.path} and would be read as data. Name another.", code=code
            )


def _chosen_in(folder: Path, split: str | None) -> ChosenSplit[Path]:
    files = {file.relative_to(folder).as_posix(): file for file in sorted(filter(_is_file, _walk(folder)))}
    if any(name.endswith(".arrow") for name in files) and not any(is_named_as_data(PurePath(name)) for name in files):
        raise DataError(
            f"{folder} was written by save_to_disk, which only the library `datasets` reads. Write it with to_parquet instead.",
            code="data.saved_to_disk",
        )
    return choose_among(files, str(folder), split, lambda: declared_in(folder))


def choose_among(
    files: Mapping[str, File], folder: str, split: str | None, declared: Callable[[], DeclaredFiles | None]
) -> ChosenSplit[File]:
    """Choose the data files of one split among all files of a folder.

    Args:
        files: the files, by their path inside the folder.
        folder: its name for messages.
        declared: returns the files that its README declares.

    Raises:
        DataError: no data files; a model's files among them; an ambiguous split.
    """
    data_files = {name: file for name, file in files.items() if is_named_as_data(PurePath(name))}
    # A table next to other data is about it, more often than not; the log names it among the files that are left out.
    texts = {name: file for name, file in data_files.items() if ending_of(name) not in TABLES}
    data_files = texts or data_files
    if not data_files:
        but = f", only files such as {PurePath(next(iter(files))).name}" if files else ""
        raise DataError(
            f"{folder} has no {', '.join(_TEXTS)} or {PARQUET} file{but}. Check {DATA_OPTIONS}.", code="data.no_data_files"
        )
    chosen = choose_split(folder, data_files, declared(), split)
    model_file = next((file for name, file in data_files.items() if _is_of_model(name) and file in chosen.files), None)
    if model_file is not None:
        raise DataError(
            f"{model_file} belongs to a model or a run (--output_dir), but is inside the data folder {folder} and would be "
            "read as data. Move that model or run out of the data folder, or name the data files themselves.",
            code="data.model_inside_data",
        )
    return replace(chosen, left_out=tuple(name for name in files if name not in data_files))


def _is_of_model(name: str) -> bool:
    return PurePath(name).name in _MODEL_FILES


def _stat(file: Path) -> tuple[int, int, int, int]:
    """Return the device, inode, size and time of the last write; permissions and links don't count."""
    with readable(file, argument=DATA_OPTIONS):
        status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(file: Path) -> str:
    with readable(file, argument=DATA_OPTIONS), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksums(file: Path) -> list[int]:
    """Return the CRC-32 of the beginning and of the end of a file."""
    with readable(file, argument=DATA_OPTIONS), file.open("rb") as opened:
        first = zlib.crc32(opened.read(_END_BYTES))
        opened.seek(-min(_END_BYTES, file.stat().st_size), os.SEEK_END)
        return [first, zlib.crc32(opened.read())]


def _is_file(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a broken link to {path.readlink()}. Repair or remove it.", code="data.broken_link")
    return path.is_file()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all that is not hidden below a folder, following links; visit each folder once, and no parent of `folder`."""
    top, visited = Path(os.path.realpath(folder)), set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = Path(os.path.realpath(current))
        if real in visited or (real != top and top.is_relative_to(real)):
            folders.clear()
            continue
        visited.add(real)
        yield from (Path(current) / name for name in files if not name.startswith("."))


def _raise_unreadable(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} can't be read: {error.strerror}. Check its permissions.", code="data.folder_unreadable"
    ) from error
