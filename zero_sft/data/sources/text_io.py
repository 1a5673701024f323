"""A text file of the user's, or one clear error."""

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


def _open_zstd(path: Path, _: str, *, encoding: str, errors: str) -> TextIO:
    """As `gzip.open`, for text; pyarrow has the decompressor, and Python before 3.14 has none."""
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(path.open("rb"), "zstd")
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors)


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
"""How compressed text is opened, by the end of its name."""


def read_text(path: Path, *, expected: str, argument: str) -> str:
    """The file's text, UTF-8 with or without a byte order mark. Any rank by itself; does not communicate.

    `expected` says what should be in it, `argument` which argument named it; both for the message.

    Raises:
        DataError: no such file, a folder, not UTF-8, or nothing in it.
    """
    with open_text(path, argument=argument) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path} is empty; expected {expected}.", code="data.empty_file")
    return text


@contextlib.contextmanager
def open_text(path: Path, *, argument: str, errors: str = "strict") -> Iterator[TextIO]:
    """The file, to be read whole or line by line within the block; errors as `readable`'s.

    `errors`: what is done with bytes that are not UTF-8, as `open`'s.
    """
    opener = COMPRESSED.get(path.suffix.lower(), open)
    with readable(path, argument=argument), opener(path, "rt", encoding="utf-8-sig", errors=errors) as file:
        yield file


@contextlib.contextmanager
def readable(path: Path, *, argument: str) -> Iterator[None]:
    """Whatever goes wrong with a file within the block, in one clear error.

    Raises:
        DataError: no such file, a folder, not UTF-8 or not readable.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}. Check {argument}.", code="data.no_such_file") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a folder; expected a file. Name the file itself.", code="data.folder_in_place_of_file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}. Save it as UTF-8.", code="data.not_utf8") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) is None:  # what a decompressor says
            raise DataError(f"{path} is damaged: {error}. Compress it again.", code="data.bad_compression") from error
        raise DataError(
            f"{path} can't be read: {getattr(error, 'strerror', error)}. Check {argument}.", code="data.file_unreadable"
        ) from error
