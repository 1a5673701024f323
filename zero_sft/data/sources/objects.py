"""Read the objects of one file, local or remote: JSON (one list, or one object per line), Parquet, CSV or TSV.

The content, not the file name, decides between a JSON list and JSON lines; the file name's ending decides how text is
decompressed. Every object comes with its place for messages: its line or sample number, counted from 1.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from zero_sft.data.samples.sample_formats import EXPECTED
from zero_sft.data.sources.json_list import ListReader
from zero_sft.data.sources.text_io import COMPRESSED, DataFile, open_text
from zero_sft.errors import DataError
from zero_sft.json_text import JsonError, NestingError, parse_json
from zero_sft.printable import excerpt, printable

PARQUET = ".parquet"
TABLES = {".csv": ",", ".tsv": "\t"}
"""The separator of tables in text, by the ending of the file's name."""
DATA_OPTIONS = "--data_path and --eval_data_path"

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


class Skip:
    """A number of objects that are passed over, without parsing them where that is possible. Reading counts `left` down."""

    def __init__(self, left: int = 0) -> None:
        self.left = left

    def takes(self) -> bool:
        """Whether the next object is passed over; counts it."""
        if self.left:
            self.left -= 1
            return True
        return False


def read_objects(path: DataFile, skip: Skip | None = None) -> Iterator[tuple[Any, str]]:
    """Yield each object with its place, "<file>, sample 3" or "<file>, line 3 (id 'a')", after those that `skip` takes.

    The `DataError` of a line that is not valid JSON takes the object's place, so that later lines can still be read.

    Raises:
        DataError: no such file, not UTF-8, not JSON, damaged or empty.
    """
    is_parquet = path.suffix.lower() == PARQUET
    _require_kind(path, is_parquet=is_parquet)
    name = printable(str(path), keep="")
    separator = TABLES.get(ending_of(path.name))
    skip = skip or Skip()
    if is_parquet:
        rows = _read_parquet(path, skip)
    else:
        rows = _read_table(path, separator, skip) if separator else _read_json(path, skip)
    for sample, place in rows:
        yield sample, f"{name}, {place}{_id_suffix(sample)}"


def read_files(files: Iterable[DataFile], start: int) -> Iterator[tuple[Any, str]]:
    """Yield each object of all files from number `start` on with its place, as `read_objects` does."""
    skip = Skip(start)
    for file in files:
        yield from read_objects(file, skip)


def _require_kind(path: DataFile, *, is_parquet: bool) -> None:
    """Refuse what is not the JSON or Parquet that its name promises. Skip unreadable files: reading them raises the error."""
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
        if start.startswith(beginning) or (beginning.startswith(b"<") and start.upper().startswith(beginning.upper())):
            raise DataError(f"{path} is {kind}.", code="data.unsupported_kind")


def _read_json(path: DataFile, skip: Skip) -> Iterator[tuple[Any, str]]:
    with open_text(path, argument=DATA_OPTIONS, errors="surrogateescape") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    if not first:
        raise DataError(f"{path} is empty; expected {EXPECTED}, as a JSON list or one object per line.", code="data.empty_file")
    if "\0" in first:
        raise DataError(f"{path} holds zero bytes, as UTF-16 does. Save it as UTF-8.", code="data.not_utf8")
    if first == "{":
        raise DataError(
            f"{path} is one JSON object over several lines; expected one JSON list of samples, or one sample per line. Write "
            "only the list, or each object on one line.",
            code="data.object_over_lines",
        )
    yield from _read_list(path, skip) if first.startswith("[") else _read_lines(path, skip)


def _read_list(path: DataFile, skip: Skip) -> Iterator[tuple[Any, str]]:
    """Read item by item, since the file may be larger than memory."""
    with open_text(path, argument=DATA_OPTIONS) as file:
        reader, number = ListReader(file), 0
        try:
            for number, sample in enumerate(reader, start=1):
                if not skip.takes():
                    yield sample, f"sample {number}"
        except JsonError as error:
            raise _not_json(error, path, reader.line, reader.column, reader.text, f"sample {number + 1}") from error


def _read_lines(path: DataFile, skip: Skip) -> Iterator[tuple[Any, str]]:
    """Read line by line, since the file may be larger than memory."""
    with open_text(path, argument=DATA_OPTIONS, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not skip.takes():
                try:
                    sample = _parse_line(line, path, number)
                except DataError as error:
                    sample = error
                yield sample, f"line {number}"


def _parse_line(line: str, path: DataFile, number: int) -> Any:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number} is not UTF-8. Save the file as UTF-8.", code="data.not_utf8") from error
    return _parse_json(line.rstrip("\n"), path, number)


def ending_of(name: str) -> str:
    """Return the ending of a file's name, without that of a compression."""
    path = PurePath(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _read_table(path: DataFile, separator: str, skip: Skip) -> Iterator[tuple[Any, str]]:
    """Read rows of CSV or TSV, with the names of the columns in the first line; every value is a text."""
    csv.field_size_limit(2**31 - 1)  # of the process; by default 128 KiB, less than a long text
    with open_text(path, argument=DATA_OPTIONS, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(reader, None)
            if not names:
                raise DataError(
                    f"{path} is empty; expected the names of the columns in its first line.", code="data.empty_file"
                )
            if len(set(names)) < len(names):
                raise DataError(
                    f"{path} has duplicate names among its columns {', '.join(map(excerpt, names))}. Rename them.",
                    code="data.duplicate_columns",
                )
            for row in reader:
                if not row or skip.takes():
                    continue
                sample: Any = dict(zip(names, row, strict=False))
                if len(row) != len(names):
                    sample = DataError(
                        f"{path}, line {reader.line_num}: {len(row)} values, but there are {len(names)} columns: "
                        f"{', '.join(map(excerpt, names))}. Quote values that have the separator in them.",
                        code="data.bad_table_row",
                    )
                yield sample, f"line {reader.line_num}"
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not valid {ending_of(path.name)[1:].upper()}: {error}. Repair that line.",
                code="data.bad_table",
            ) from error


def _read_parquet(path: DataFile, skip: Skip) -> Iterator[tuple[Any, str]]:
    import pyarrow
    from pyarrow import parquet

    opened = False
    try:
        with path.open("rb") as content, parquet.ParquetFile(content) as file:
            names = file.schema_arrow.names
            opened = True
            if len(set(names)) < len(names):
                raise DataError(
                    f"{path} has duplicate names among its columns {', '.join(map(excerpt, names))}. Rename them.",
                    code="data.duplicate_columns",
                )
            number = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skip.left >= rows:
                    skip.left, number = skip.left - rows, number + rows
                    continue
                for row in (row for batch in file.iter_batches(row_groups=[group]) for row in batch.to_pylist()):
                    number += 1
                    if not skip.takes():
                        yield row, f"sample {number}"
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}. Check {DATA_OPTIONS}.", code="data.no_such_file") from error
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: a bad value in a column
        remedy = "Repair that column, or leave it out." if opened else "Write it again."
        raise DataError(
            f"{path} is not valid Parquet: {printable(str(error), keep='').rstrip('.')}. {remedy}", code="data.bad_parquet"
        ) from error


def _parse_json(text: str, path: DataFile, line: int) -> Any:
    try:
        return parse_json(text)
    except JsonError as error:
        raise _not_json(error, path, line, error.column, text) from error


def _not_json(error: JsonError, path: DataFile, line: int, column: int, text: str, sample: str = "") -> DataError:
    """Explain a fault at a place in the file, in the JSON `text`; `sample` is the number of the one that it is in, if known."""
    place = f"{path}, {sample} (line {line})" if sample else f"{path}, line {line}"
    if isinstance(error, NestingError):
        return DataError(
            f"{place}: JSON is nested too deeply for conversations. Expected {EXPECTED}.", code="data.json_nested_too_deep"
        )
    if error.position is None:  # a number with thousands of digits, or a duplicate key
        return DataError(f"{place}: invalid JSON: {error}.", code="data.bad_json_value")
    return DataError(
        f"{path}, line {line}: not JSON: {error}, at column {column}; got {_excerpt(text, error.position)}. Expected one JSON "
        "list, or one JSON object per line. Name Parquet files .parquet, and tables .csv or .tsv.",
        code="data.not_json",
    )


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20]) if text[position:].strip() else "the end"


def _id_suffix(sample: Any) -> str:
    sample_id = sample.get("id") if isinstance(sample, Mapping) else None
    return f" (id {excerpt(repr(sample_id))})" if isinstance(sample_id, str | int) else ""
