"""Read objects from local files: JSON (one list, or one object per line), Parquet, and folders of such files.

The content, not the file name, decides between a JSON list and JSON lines; the file name's ending decides how text is
decompressed. Every object comes with its place for messages: its line or sample number, counted from 1.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.file_identity import FileIdentity, stat_identity
from zero_sft.data.samples.sample_formats import EXPECTED
from zero_sft.data.sources.file_kinds import require_kind
from zero_sft.data.sources.splits import ChosenSplit, choose_split
from zero_sft.data.sources.text_io import COMPRESSED, open_text, readable
from zero_sft.errors import CheckpointError, DataError
from zero_sft.printable import excerpt, printable

_TEXTS = (".json", ".jsonl")
_PARQUET = ".parquet"
_ENDINGS = (*_TEXTS, _PARQUET, *(text + compressed for text in _TEXTS for compressed in COMPRESSED))

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

_ARGUMENTS = "--data_path and --eval_data_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """The error of a line that is not valid JSON; it takes the object's place, so that later lines can still be read."""

    message: str
    code: str


def is_named_as_data(path: Path) -> bool:
    """Whether a file is a data file, judged by its name."""
    return path.name.lower().endswith(_ENDINGS) and path.name not in _ABOUT_DATA


def files_of(path: Path, split: str | None = None) -> ChosenSplit:
    """List the files to read: the path itself, or all data files of one split in and below a folder, sorted.

    Raises:
        DataError: a folder without data files, or one whose split is ambiguous.
    """
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path} is a pipe or a device, which can't be read twice; expected a file. Write the data to a file.",
                code="data.not_a_regular_file",
            )
        return ChosenSplit(files=(path,))
    visible_files = _visible_files(path)
    data_files = [file for file in visible_files if is_named_as_data(file)]
    if not data_files and any(file.suffix == ".arrow" for file in visible_files):
        raise DataError(
            f"{path} was written by save_to_disk, which only the library `datasets` reads. Write it with to_parquet instead.",
            code="data.saved_to_disk",
        )
    if not data_files:
        but = f", only files such as {visible_files[0].name}" if visible_files else ""
        raise DataError(
            f"{path} has no {', '.join(_TEXTS)} or {_PARQUET} file{but}. Check {_ARGUMENTS}.", code="data.no_data_files"
        )
    chosen = choose_split(path, data_files, split)
    model_file = next((file for file in chosen.files if file.name in _MODEL_FILES), None)
    if model_file is not None:
        raise DataError(
            f"{model_file} belongs to a model or a run (--output_dir), but is inside the data folder {path} and would be "
            "read as data. Move that model or run out of the data folder, or name the data files themselves.",
            code="data.model_inside_data",
        )
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """A file, or one split of a folder of files, as a source of objects; for `split` see `choose_split`."""

    path: Path
    split: str | None = None

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{self.path}:{self.split}" if self.split else str(self.path)

    @property
    def _files(self) -> tuple[Path, ...]:
        return files_of(self.path, self.split).files

    def objects(self) -> Iterator[tuple[Any, str]]:
        """Yield each object of all files with its place, as `read_objects` does."""
        for file in self._files:
            yield from read_objects(file)

    def identity(self) -> list[Any]:
        """Return JSON-able digests of the files' contents; they do not depend on the folder or on dates.

        Raises:
            DataError: no such file, or one that can't be read.
        """
        return [_digest(file) for file in self._files]

    def left_out(self) -> tuple[str, ...]:
        """Return the names of files in the folder that are not data."""
        if not self.path.is_dir():
            return ()
        return tuple(str(file.relative_to(self.path)) for file in _visible_files(self.path) if not is_named_as_data(file))

    def note(self) -> str:
        """Return a line for the log that says which split is read, if the folder has several; else an empty text."""
        return files_of(self.path, self.split).note

    def held_out(self) -> str | None:
        """Return a split of the folder that is left out although the user has not named one; None if there is none."""
        return files_of(self.path, self.split).held_out

    def state(self) -> list[Any]:
        """Return values that change when the files are written to, without reading the files; raises as `identity` does."""
        return [(file, _identity_of(file)) for file in self._files]

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Raise an error with that code if files written below `root`, the value of `option`, would be read as data."""
        if (
            self.path.is_dir()
            and root.resolve().is_relative_to(self.path.resolve())
            and not _is_hidden(root.resolve(), self.path.resolve())
        ):
            raise DataError(
                f"{option} {root} is inside the data folder {self.path} and would be read as data. Name another.", code=code
            )


def _identity_of(file: Path) -> FileIdentity:
    try:
        return stat_identity(file)
    except CheckpointError as error:
        raise DataError(f"no such file: {file}. Check {_ARGUMENTS}.", code="data.no_such_file") from error


def _digest(file: Path) -> str:
    with readable(file, argument=_ARGUMENTS), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _visible_files(folder: Path) -> list[Path]:
    """List all files in and below a folder that are not hidden, sorted.

    Raises:
        DataError: a broken link, or a folder that can't be read.
    """
    return sorted(filter(_is_file, _walk(folder)))


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


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_objects(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield each object with its place, "<file>, sample 3" or "<file>, line 3 (id 'a')"; for an invalid line, a `BadLine`.

    Raises:
        DataError: no such file, not UTF-8, not JSON, damaged or empty.
    """
    is_parquet = path.suffix.lower() == _PARQUET
    require_kind(path, is_parquet=is_parquet)
    name = printable(str(path), keep="")
    for sample, place in _read_parquet(path) if is_parquet else _read_json(path):
        yield sample, f"{name}, {place}{_id_suffix(sample)}"


def _read_json(path: Path) -> Iterator[tuple[Any, str]]:
    with open_text(path, argument=_ARGUMENTS, errors="surrogateescape") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    if not first:
        raise DataError(f"{path} is empty; expected {EXPECTED}, as a JSON list or one object per line.", code="data.empty_file")
    if first == "{":
        raise DataError(
            f"{path} is one JSON object over several lines; expected one JSON list of samples, or one sample per line. Write "
            "only the list, or each object on one line.",
            code="data.object_over_lines",
        )
    yield from _read_list(path) if first.startswith("[") else _read_lines(path)


def _read_list(path: Path) -> Iterator[tuple[Any, str]]:
    with open_text(path, argument=_ARGUMENTS) as file:
        text = file.read()
    for number, sample in enumerate(_parse_json(text, path, first_line=1), start=1):
        yield sample, f"sample {number}"


def _read_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Read line by line, since the file may be larger than memory."""
    with open_text(path, argument=_ARGUMENTS, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    sample = _parse_line(line, path, number)
                except DataError as error:
                    sample = BadLine(message=str(error), code=error.code)
                yield sample, f"line {number}"


def _parse_line(line: str, path: Path, number: int) -> Any:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number} is not UTF-8. Save the file as UTF-8.", code="data.not_utf8") from error
    return _parse_json(line.rstrip("\n"), path, first_line=number)


def _read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    from pyarrow import parquet

    opened = False
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            opened = True
            if len(set(names)) < len(names):
                raise DataError(
                    f"{path} has duplicate names among its columns {', '.join(map(excerpt, names))}. Rename them.",
                    code="data.duplicate_columns",
                )
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield row, f"sample {number}"
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}. Check {_ARGUMENTS}.", code="data.no_such_file") from error
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: a bad value in a column
        remedy = "Repair that column, or leave it out." if opened else "Write it again."
        raise DataError(
            f"{path} is not valid Parquet: {printable(str(error), keep='').rstrip('.')}. {remedy}", code="data.bad_parquet"
        ) from error


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicate_keys)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}; got "
            f"{_excerpt(error.doc, error.pos)}. Expected one JSON list, or one JSON object per line. Name Parquet files "
            ".parquet; convert other formats, such as CSV.",
            code="data.not_json",
        ) from error
    except ValueError as error:  # a number with thousands of digits, or a duplicate key
        raise DataError(f"{path}, line {first_line}: invalid JSON: {error}.", code="data.bad_json_value") from error
    except RecursionError as error:
        raise DataError(
            f"{path}, line {first_line}: JSON is nested too deeply for conversations. Expected {EXPECTED}.",
            code="data.json_nested_too_deep",
        ) from error


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object; raise ValueError for a duplicate key, which `json` would silently overwrite."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {excerpt(repr(next(key for key in keys if keys.count(key) > 1)))}")
    return fields


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20]) if text[position:].strip() else "the end"


def _id_suffix(sample: Any) -> str:
    sample_id = sample.get("id") if isinstance(sample, Mapping) else None
    return f" (id {excerpt(repr(sample_id))})" if isinstance(sample_id, str | int) else ""
