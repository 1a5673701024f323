"""Open the user's text files, plain or compressed, with one clear `DataError` for everything that can go wrong."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, Protocol, TextIO

from zero_sft.errors import DataError


class DataFile(Protocol):
    """A file of the user, local (`Path`) or remote (`RemoteFile`); `str` gives its name for messages."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    @property
    def suffix(self) -> str:
        """The ending of its name, such as ".gz"."""
        ...

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Open it, at its beginning; it can seek."""
        ...


def _open_zstd(file: BinaryIO) -> Any:
    """Decompress with pyarrow, since Python before 3.14 has no decompressor for it."""
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


COMPRESSED: Mapping[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""The function that decompresses an open file, for each ending of a compressed file's name."""


def read_text(path: DataFile, *, expected: str, argument: str) -> str:
    """Read a UTF-8 text file, with or without a byte order mark. Any rank; does not communicate.

    `expected` is the expected content and `argument` the option that named the file, for the error message.

    Raises:
        DataError: no such file, a folder, not UTF-8, or empty.
    """
    with open_text(path, argument=argument) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path} is empty; expected {expected}.", code="data.empty_file")
    return text


@contextlib.contextmanager
def open_text(path: DataFile, *, argument: str, errors: str = "strict", newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for the block, decompressed if its name says so. Raises as `readable` does.

    `errors` and `newline` are `open`'s parameters, for bytes that are not UTF-8 and for line ends.
    """
    decompress = COMPRESSED.get(path.suffix.lower(), contextlib.nullcontext)
    with readable(path, argument=argument), path.open("rb") as file, decompress(file) as content:
        with io.TextIOWrapper(content, encoding="utf-8-sig", errors=errors, newline=newline) as text:
            yield text


@contextlib.contextmanager
def readable(path: DataFile, *, argument: str) -> Iterator[None]:
    """Turn the errors of reading a file within the block into one clear error.

    Raises:
        DataError: no such file, a folder, not UTF-8, damaged or not readable.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"no such file: {path}. Check {argument}, which takes the path of a file.", code="data.no_such_file"
        ) from error
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a folder; expected a file. Name the file itself.", code="data.folder_in_place_of_file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}. Save it as UTF-8.", code="data.not_utf8") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) is None:  # a decompressor's error
            raise DataError(f"{path} is damaged: {error}. Compress it again.", code="data.bad_compression") from error
        raise DataError(
            f"{path} can't be read: {getattr(error, 'strerror', error)}. Check {argument}.", code="data.file_unreadable"
        ) from error
