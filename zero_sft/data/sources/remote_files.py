"""Files and folders at URLs as sources of objects: `s3://bucket/a.jsonl`, `hf://datasets/org/name/data:train`."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zero_sft.data.sources.declared_files import README, YAML, DeclaredFiles, declared_in
from zero_sft.data.sources.local_files import choose_among
from zero_sft.data.sources.objects import DATA_OPTIONS, read_files
from zero_sft.data.sources.splits import ChosenSplit
from zero_sft.data.sources.text_io import readable
from zero_sft.remote import RemoteFile

_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFiles:
    """A file, or one split of a folder of files, at a URL; for `split` see `choose_split`."""

    url: str
    split: str | None = None

    @property
    def name(self) -> str:
        """The name for messages, without what may be secret."""
        return ":".join(filter(None, (str(RemoteFile(self.url)), self.split)))

    def chosen(self) -> ChosenSplit[RemoteFile]:
        """Choose the files to read: the URL itself, or all data files of one split in and below a folder, sorted.

        Raises:
            DataError: nothing is there, or it can't be read; a folder without data files, or one whose split is ambiguous.
        """
        top = RemoteFile(self.url)
        with readable(top, argument=DATA_OPTIONS):
            if not top.is_folder():
                return ChosenSplit(files=(top,))
            files = top.files()
        visible = {name: file for name, file in files.items() if not _is_hidden(name)}
        return choose_among(visible, str(top), self.split, lambda: _declared(top, files))

    def objects(self, *, start: int = 0, streaming: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield each object of all files from number `start` on with its place, as `read_objects` does."""
        yield from read_files(self.chosen().files, start)

    def identity(self) -> list[Any]:
        """Return the URLs of the files, and digests of their contents, those of the server if it gives any."""
        return [[str(file), _digest(file)] for file in self.chosen().files]

    def state(self) -> list[Any]:
        """Return values that change when the files are written to, without reading the files; raises `DataError`."""
        return [(file, _version(file)) for file in self.chosen().files]

    def state_of_local_files(self) -> None:
        """Return None: a remote file is compared while it is read."""

    def fingerprint(self) -> list[Any]:
        """Return JSON-able names and versions of the files, which tell a run that is resumed whether the data is the same."""
        return [[file.name, *_version(file)] for file in self.chosen().files]

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Do nothing: no local folder is inside a remote one."""


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _declared(top: RemoteFile, files: dict[str, RemoteFile]) -> DeclaredFiles | None:
    """Read the files that the folder's README declares; None if it declares none."""
    with tempfile.TemporaryDirectory() as folder:
        for name in {README, YAML} & set(files):
            with readable(files[name], argument=DATA_OPTIONS), files[name].open() as opened:
                (Path(folder) / name).write_bytes(opened.read())
        return declared_in(Path(folder), shown=str(top))


def _version(file: RemoteFile) -> tuple[Any, ...]:
    with readable(file, argument=DATA_OPTIONS):
        return file.version()


def _digest(file: RemoteFile) -> str:
    """Return the digest that the server gives, else that of the contents."""
    with readable(file, argument=DATA_OPTIONS):
        if (given := file.digest()) is not None:
            return given
        digest = hashlib.sha256()
        with contextlib.closing(file.open()) as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()
