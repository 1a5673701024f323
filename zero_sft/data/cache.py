"""Cache prepared rows on disk, under a key of everything that they depend on, so that all ranks and later runs map them.

An entry is a folder, `<root>/<key>`, with `rows.arrow` in Arrow's stream format and `summary.json`. It is written to a
temporary folder and renamed at the end, so every existing entry is complete. If several processes write the same entry, the
first one wins. A CRC-32 checksum, at 4 GB per second, detects damage by disks; it does not protect against attackers.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.data import temporary_folders
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.sources.data_path import DataSource
from zero_sft.errors import DataError
from zero_sft.tokenizer.fingerprint import fingerprint

if TYPE_CHECKING:
    import datasets

ROWS, SUMMARY = "rows.arrow", "summary.json"

_TEMPORARY = ".making-"
_CHUNK_BYTES = 2**22

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "trl")


def cache_root(folder: str | None) -> Path:
    """Return the cache folder; by default next to the user's other prepared datasets (`HF_DATASETS_CACHE`, `HF_HOME`)."""
    from datasets import config

    return Path(folder).expanduser() if folder else Path(config.HF_DATASETS_CACHE) / "zero_sft"


def key_of(*parts: Any) -> str:
    """Hash JSON-able `parts`, the code of this folder and the versions of the libraries that it uses into a key."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))))
    return hashlib.sha256(json.dumps([code.hexdigest(), versions, *parts], sort_keys=True).encode()).hexdigest()[:32]


def key_of_rows(data: DataSource, pipeline: Pipeline) -> str:
    """Return the key of the rows that a pipeline makes from a source; raises `DataError` if the source does not exist."""
    return key_of(data.identity(), *pipeline_identity(pipeline))


def pipeline_identity(pipeline: Pipeline) -> list[Any]:
    """Return all that the rows of an object depend on, as JSON-able values."""
    return [
        _tokenizer_identity(pipeline.tokenizer),
        [type(pipeline.template).__name__, str(pipeline.template.jinja(pipeline.tokenizer))],
        [
            asdict(pipeline.parser),
            pipeline.model_max_length,
            pipeline.overlong,
            pipeline.lazy,
            pipeline.id_limit,
        ],
    ]


def _tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Collect everything that encodings and templates depend on. Padding and truncation are set by each call instead."""
    properties = fingerprint(tokenizer)
    for name in ("backend", "chat template", "padding side", "truncation side", "model_max_length"):
        del properties[name]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    is_custom = type(tokenizer).__module__.startswith("transformers_modules.")
    source_file = inspect.getsourcefile(type(tokenizer)) if is_custom else None
    return {
        **properties,
        "backend": {**backend, "padding": None, "truncation": None},
        "split special tokens": tokenizer.split_special_tokens,
        "code": Path(source_file).read_text(encoding="utf-8") if source_file else None,
    }


def find(root: Path, key: str, *, verify: bool = True) -> "tuple[datasets.Dataset, Mapping[str, Any]] | None":
    """Look up an entry; return its rows, memory-mapped, and their summary, or None if there is no such entry.

    Args:
        verify: read the whole entry and compare its checksum. One rank per node does so; the others don't repeat it.

    Raises:
        DataError: an entry that can't be read, is incomplete, or has another checksum.
    """
    import datasets

    folder = root / key
    if not (folder / SUMMARY).exists():
        return None
    try:
        dataset = datasets.Dataset.from_file(str(folder / ROWS))
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if content["rows"] != len(dataset):
            raise ValueError(f"it has {len(dataset)} of {content['rows']} rows")
        if verify and content["crc32"] != _checksum(folder / ROWS, content["summary"]):
            raise ValueError("its checksum differs from the one it was written with")
        return dataset, content["summary"]
    except (OSError, ValueError, LookupError, TypeError) as error:  # includes pyarrow's errors
        raise DataError(
            f"{folder} is damaged: {error}. Delete that folder; the next run prepares the data again.",
            code="data.cache_entry_damaged",
        ) from error


def _checksum(rows: Path, summary: Mapping[str, Any]) -> int:
    """Compute the CRC-32 of the rows' file and of their summary."""
    value = zlib.crc32(json.dumps(summary, sort_keys=True).encode())
    with rows.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def find_or_store(
    root: Path, key: str, write: Callable[[Path], tuple[int, Mapping[str, Any]]], *, verify: bool = True
) -> "tuple[datasets.Dataset, Mapping[str, Any], bool]":
    """Return the cached entry, creating it with `store` if it is absent, and whether it existed. See `find` for `verify`."""
    entry, existed = find(root, key, verify=verify), True
    if entry is None:
        store(root, key, write)
        entry, existed = find(root, key, verify=False), False
    if entry is None:
        raise DataError(
            f"{root / key} disappeared right after it was written. Name a folder that no other process clears with "
            "--data_cache_dir.",
            code="data.cache_entry_gone",
        )
    return *entry, existed


def store(root: Path, key: str, write: Callable[[Path], tuple[int, Mapping[str, Any]]]) -> None:
    """Create an entry. `write` writes the rows to a given path, and returns their number and their summary.

    An error of `write`, or the `DataError` of a folder that can't be written to, leaves no files behind.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary_folders.remove_abandoned(root, _TEMPORARY)
        prefix = temporary_folders.prefix(_TEMPORARY)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as temporary:
            entry = Path(temporary) / key
            entry.mkdir()
            rows, summary = write(entry / ROWS)
            content = {"rows": rows, "summary": summary, "crc32": _checksum(entry / ROWS, summary)}
            (entry / SUMMARY).write_text(json.dumps(content), encoding="utf-8")
            for file in entry.iterdir():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            _move_into_place(entry, root / key)
    except OSError as error:
        raise DataError(
            f"can't write prepared data to {root}: {error.strerror or error}. Name a writable folder with enough space with "
            "--data_cache_dir.",
            code="data.cache_unwritable",
        ) from error


def _move_into_place(entry: Path, target: Path) -> None:
    try:
        entry.rename(target)
    except OSError:
        if (target / SUMMARY).exists():  # another process was first, with the same rows
            return
        shutil.rmtree(target, ignore_errors=True)  # the remains of an entry that was partly deleted
        entry.rename(target)
