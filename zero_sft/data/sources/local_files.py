"""From files to objects: JSON, one list or one object a line, Parquet, and folders of them.

JSON and JSON lines are told apart by their content, not by the file's name; compressed text by the end of it. Everything has a
place, a line's or a sample's number from 1 on, that messages name.
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
from zero_sft.printable import on_one_line, printable

_TEXTS = (".json", ".jsonl")
_PARQUET = ".parquet"
_ENDINGS = (*_TEXTS, _PARQUET, *(text + compressed for text in _TEXTS for compressed in COMPRESSED))

_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the library `datasets` writes next to data."""

_OF_A_MODEL = frozenset(
    f"{name}.json"
    for name in (
        *("config", "generation_config", "adapter_config", "preprocessor_config", "processor_config", "trainer_state"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab"),
        *("model.safetensors.index", "pytorch_model.bin.index"),
    )
)
"""What transformers and the Trainer write into the folder of a model or of a run."""

_ARGUMENTS = "--data_path and --eval_data_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """In the place of an object, a line of a file that is not JSON, while the others may be: the error that it makes."""

    message: str
    code: str


def is_named_as_data(path: Path) -> bool:
    """Whether a file's name is that of a file of data."""
    return path.name.lower().endswith(_ENDINGS) and path.name not in _ABOUT_DATA


def files_of(path: Path, split: str | None = None) -> ChosenSplit:
    """The files that a path stands for: itself, or a folder's, sorted, those of folders inside too, of one split.

    Raises:
        DataError: a folder without any, or one that leaves open which split is meant.
    """
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path} is a pipe or a device, and can't be read twice. Write the data to a file.",
                code="data.not_a_regular_file",
            )
        return ChosenSplit(files=(path,))
    seen = _seen_in(path)
    found = [each for each in seen if is_named_as_data(each)]
    if not found and any(each.suffix == ".arrow" for each in seen):
        raise DataError(
            f"{path} was written by save_to_disk, for the library `datasets` alone. Write it with to_parquet instead.",
            code="data.saved_to_disk",
        )
    if not found:
        but = f", but {seen[0].name}" if seen else ""
        raise DataError(
            f"{path} has no {', '.join(_TEXTS)} or {_PARQUET} file{but}. Check {_ARGUMENTS}.", code="data.no_data_files"
        )
    chosen = choose_split(path, found, split)
    of_a_model = next((file for file in chosen.files if file.name in _OF_A_MODEL), None)
    if of_a_model is not None:
        raise DataError(
            f"{of_a_model} is a file of a model or of a run (--output_dir), in the folder of the data, {path}, and would be "
            "read as data. Move that model or run out of the data, or name the files of the data.",
            code="data.model_inside_data",
        )
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """A file, or a folder of files, as a source of objects; `split`: which of a folder's, see `choose_split`."""

    path: Path
    split: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path}:{self.split}" if self.split else str(self.path)

    @property
    def _files(self) -> tuple[Path, ...]:
        return files_of(self.path, self.split).files

    def objects(self) -> Iterator[tuple[Any, str]]:
        """`read_objects` of each file."""
        for file in self._files:
            yield from read_objects(file)

    def identity(self) -> list[Any]:
        """What is in the files, JSON-able: other contents have another identity, other dates and folders have not.

        Raises:
            DataError: no such file, or it can't be read.
        """
        return [_digest(each) for each in self._files]

    def left_out(self) -> tuple[str, ...]:
        """Names of files in the folder that are not read."""
        if not self.path.is_dir():
            return ()
        return tuple(str(each.relative_to(self.path)) for each in _seen_in(self.path) if not is_named_as_data(each))

    def note(self) -> str:
        """A line for the log on which split is read, where the folder has several."""
        return files_of(self.path, self.split).note

    def held_out(self) -> str | None:
        """A split of the folder that is not read, where none was named."""
        return files_of(self.path, self.split).held_out

    def state(self) -> list[Any]:
        """Tells whether the files were written to meanwhile, without reading them; errors as `identity`'s."""
        return [(each, _stamp(each)) for each in self._files]

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Raise, with that code, if files that are written below `root`, which `option` names, would be read as data."""
        if (
            self.path.is_dir()
            and root.resolve().is_relative_to(self.path.resolve())
            and not _is_hidden(root.resolve(), self.path.resolve())
        ):
            raise DataError(
                f"{option} {root} is inside the data, {self.path}, and would be read with it. Name another.", code=code
            )


def _stamp(file: Path) -> FileIdentity:
    try:
        return stat_identity(file)
    except CheckpointError as error:
        raise DataError(f"no such file: {file}. Check {_ARGUMENTS}.", code="data.no_such_file") from error


def _digest(file: Path) -> str:
    with readable(file, argument=_ARGUMENTS), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _seen_in(folder: Path) -> list[Path]:
    """All files in and below a folder that are not hidden, sorted.

    Raises:
        DataError: a link to nothing, or a folder that can't be read.
    """
    return sorted(filter(_is_file, _below(folder)))


def _is_file(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nothing, {path.readlink()}. Repair or remove it.", code="data.broken_link")
    return path.is_file()


def _below(folder: Path) -> Iterator[Path]:
    """All that is not hidden in a folder, its folders and those that they link to; each once, none that this one is in."""
    top, seen = Path(os.path.realpath(folder)), set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders[:] = [each for each in folders if not each.startswith(".")]
        real = Path(os.path.realpath(place))
        if real in seen or (real != top and top.is_relative_to(real)):
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} can't be read: {error.strerror}. Check its rights.", code="data.folder_unreadable"
    ) from error


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_objects(path: Path) -> Iterator[tuple[Any, str]]:
    """Each object with its place, "<file>, sample 3" or "<file>, line 3 (id 'a')"; for a broken line, a `BadLine`.

    Raises:
        DataError: no such file, not UTF-8, not JSON, damaged, or nothing in it; with the remedy.
    """
    is_parquet = path.suffix.lower() == _PARQUET
    require_kind(path, is_parquet=is_parquet)
    name = printable(str(path), keep="")
    for each, place in _parquet(path) if is_parquet else _json_objects(path):
        yield each, f"{name}, {place}{_identity(each)}"


def _json_objects(path: Path) -> Iterator[tuple[Any, str]]:
    with open_text(path, argument=_ARGUMENTS, errors="surrogateescape") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    if not first:
        raise DataError(f"{path} is empty; expected {EXPECTED}, as one JSON list or one object a line.", code="data.empty_file")
    if first == "{":
        raise DataError(
            f"{path} is one JSON object over several lines; expected one JSON list of samples, or one sample a line. Write the "
            "list alone, or each object in a line of its own.",
            code="data.object_over_lines",
        )
    yield from _list(path) if first.startswith("[") else _lines(path)


def _list(path: Path) -> Iterator[tuple[Any, str]]:
    with open_text(path, argument=_ARGUMENTS) as file:
        text = file.read()
    for number, sample in enumerate(_json(text, path, first_line=1), start=1):
        yield sample, f"sample {number}"


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Line by line: such a file may be larger than the memory."""
    with open_text(path, argument=_ARGUMENTS, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    sample = _line(line, path, number)
                except DataError as error:
                    sample = BadLine(message=str(error), code=error.code)
                yield sample, f"line {number}"


def _line(line: str, path: Path, number: int) -> Any:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8. Save the file as UTF-8.", code="data.not_utf8") from error
    return _json(line.rstrip("\n"), path, first_line=number)


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    from pyarrow import parquet

    opened = False
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            opened = True
            if len(set(names)) < len(names):
                raise DataError(
                    f"{path} has several columns of one name, among {', '.join(map(on_one_line, names))}. Rename them.",
                    code="data.duplicate_columns",
                )
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield row, f"sample {number}"
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}. Check {_ARGUMENTS}.", code="data.no_such_file") from error
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: of a value in a column
        remedy = "Repair the column, or write it without." if opened else "Write it again."
        raise DataError(
            f"{path} is no usable Parquet file: {printable(str(error), keep='').rstrip('.')}. {remedy}", code="data.bad_parquet"
        ) from error


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}; got "
            f"{_excerpt(error.doc, error.pos)}. The file must be one JSON list, or one JSON object a line; one of "
            "Parquet is named .parquet, and others (CSV) are not read.",
            code="data.not_json",
        ) from error
    except ValueError as error:  # a number of thousands of digits, a key that is there twice
        raise DataError(f"{path}, line {first_line}: not usable as JSON: {error}.", code="data.bad_json_value") from error
    except RecursionError as error:
        raise DataError(
            f"{path}, line {first_line}: JSON nested too deep to be conversations. Expected {EXPECTED}.",
            code="data.json_nested_too_deep",
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {on_one_line(repr(next(key for key in keys if keys.count(key) > 1)))} is there twice")
    return made


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20]) if text[position:].strip() else "the end"


def _identity(sample: Any) -> str:
    name = sample.get("id") if isinstance(sample, Mapping) else None
    return f" (id {on_one_line(repr(name))})" if isinstance(name, str | int) else ""
