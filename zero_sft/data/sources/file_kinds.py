"""Reject files whose content is not of the kind that their name promises; the first bytes show the real kind."""

from pathlib import Path

from zero_sft.data.sources.text_io import COMPRESSED
from zero_sft.errors import DataError

_LFS = b"version https://git-lfs.github.com/spec/"
_BEGINNINGS = {
    b"PAR1": "a Parquet file. Name it .parquet",
    b"\x1f\x8b": "compressed with gzip. Let its name end in .gz",
    b"BZh": "compressed with bzip2. Let its name end in .bz2",
    b"\xfd7zXZ\x00": "compressed with xz. Let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Let its name end in .zst",
    b"PK\x03\x04": "a zip archive. Unpack it",
    b"ARROW1": "an Arrow file. Write it as Parquet or JSON lines",
    b"\xff\xff\xff\xff": "an Arrow stream. Write it as Parquet or JSON lines",
    b"\xff\xfe": "UTF-16. Save it as UTF-8",
    b"\xfe\xff": "UTF-16. Save it as UTF-8",
    b"<!DOCTYPE": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
}


def require_kind(path: Path, *, is_parquet: bool) -> None:
    """Check that a file named as JSON or Parquet can be one. Skip unreadable files: reading them later raises the error.

    Raises:
        DataError: a git-LFS pointer, a compressed file without the ending for it, an archive, a web page or UTF-16 text.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return
    if start.startswith(_LFS):
        raise DataError(
            f"{path} is a git-LFS pointer without the data. Fetch the data with `git lfs pull` or `hf download`.",
            code="data.placeholder_file",
        )
    if is_parquet or path.suffix.lower() in COMPRESSED:
        return
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            raise DataError(f"{path} is {kind}.", code="data.unsupported_kind")
