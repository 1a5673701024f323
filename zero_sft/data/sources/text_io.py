"""Open the user's text files, plain or compressed, with one clear `DataError` for everything that can go wrong."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from zero_sft.errors import DataError


def _open_zstd(path: Path, _: str, *, encoding: str, errors: str, newline: str | None) -> TextIO:
    """Open as `gzip.open` does in text mode. Uses pyarrow's decompressor, since Python before 3.14 does not have one."""
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(path.open("rb"), "zstd")
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
"""The opener for each file name ending of compressed text."""


def read_text(path: Path, *, expected: str, argument: str) -> str:
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
def open_text(path: Path, *, argument: str, errors: str = "strict", newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for the block, decompressed if its name says so. Raises as `readable` does.

    `errors` and `newline` are `open`'s parameters, for bytes that are not UTF-8 and for line ends.
    """
    opener = COMPRESSED.get(path.suffix.lower(), open)
    with readable(path, argument=argument), opener(path, "rt", encoding="utf-8-sig", errors=errors, newline=newline) as file:
        yield file


@contextlib.contextmanager
def readable(path: Path, *, argument: str) -> Iterator[None]:
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
