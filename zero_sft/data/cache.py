"""Prepared rows on disk, under a key of all that they depend on, so that they are made once and mapped by everybody.

An entry is a folder, `<root>/<key>`: `rows.arrow`, Arrow's stream format, and `account.json`. It is written beside its place
and takes it at the end by a rename, so an entry that is there is whole; of several writers the first wins. A checksum tells
whether it still is what was written: CRC-32, which reads 4 GB a second, and is about disks, not about attackers.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.data.pipeline import Pipeline
from zero_sft.data.sources.data_path import Data
from zero_sft.errors import DataError
from zero_sft.tokenizer.fingerprint import fingerprint

if TYPE_CHECKING:
    import datasets

ROWS, ACCOUNT = "rows.arrow", "account.json"

_MAKING = ".making-"
_CHUNK_BYTES = 2**22
_ABANDONED_SECONDS = 3 * 24 * 3600

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "trl")


def cache_root(folder: str | None) -> Path:
    """That folder; by default beside the other prepared datasets of this user, below `HF_DATASETS_CACHE` or `HF_HOME`."""
    from datasets import config

    if folder:
        return Path(folder).expanduser()
    return Path(config.HF_DATASETS_CACHE) / "zero_sft"


def key_of(*parts: Any) -> str:
    """A name for what depends on JSON-able `parts`, on the code of this folder and on the libraries that it calls."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return hashlib.sha256(json.dumps([_code(), versions, *parts], sort_keys=True).encode()).hexdigest()[:32]


def _code() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()


def key_of_rows(data: Data, pipeline: Pipeline) -> str:
    """The key of what a pipeline makes of a source.

    Raises:
        DataError: there is no such source.
    """
    return key_of(
        data.identity(),
        _tokenizer(pipeline.tokenizer),
        [type(pipeline.template).__name__, str(pipeline.template.jinja(pipeline.tokenizer))],
        [asdict(pipeline.reader), pipeline.model_max_length, pipeline.lazy, pipeline.embedding_rows],
    )


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What its encodings and templates depend on; how it pads and cuts is set anew with each call."""
    known = fingerprint(tokenizer)
    for name in ("backend", "chat template", "padding side", "truncation side", "model_max_length"):
        del known[name]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    code = inspect.getsourcefile(type(tokenizer)) if type(tokenizer).__module__.startswith("transformers_modules.") else None
    return {
        **known,
        "backend": {**backend, "padding": None, "truncation": None},
        "split special tokens": tokenizer.split_special_tokens,
        "code": Path(code).read_text(encoding="utf-8") if code else None,
    }


def find(root: Path, key: str, *, verify: bool = True) -> "tuple[datasets.Dataset, Mapping[str, Any]] | None":
    """The rows of that key, mapped, and their account; None where there is no such entry.

    `verify`: read all of it, and compare its checksum. One rank of a node does so; the others need not do it again.

    Raises:
        DataError: an entry that can't be read, has not all of its rows, or is not what was written.
    """
    import datasets

    folder = root / key
    if not (folder / ACCOUNT).exists():
        return None
    try:
        dataset = datasets.Dataset.from_file(str(folder / ROWS))
        account = json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))
        if account["rows"] != len(dataset):
            raise ValueError(f"{len(dataset)} rows of {account['rows']}")
        if verify and account["crc32"] != _checksum(folder / ROWS, account["account"]):
            raise ValueError("its checksum is not the one that it was written with")
        return dataset, account["account"]
    except (OSError, ValueError, LookupError, TypeError) as error:  # pyarrow's errors are among them
        raise DataError(
            f"{folder} is damaged: {error}. Delete that folder; it will be made anew.", code="data.cache_entry_damaged"
        ) from error


def _checksum(rows: Path, account: Mapping[str, Any]) -> int:
    """Of the rows' file and of their account."""
    value = zlib.crc32(json.dumps(account, sort_keys=True).encode())
    with rows.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def keep(
    root: Path, key: str, write: Callable[[Path], tuple[int, Mapping[str, Any]]], *, verify: bool = True
) -> "tuple[datasets.Dataset, Mapping[str, Any], bool]":
    """`find`, where there is nothing `store` first; and whether it was there. Errors as theirs.

    `verify`: compare the checksum of an entry that was there.

    Raises:
        DataError: the entry was cleared away as soon as it was there.
    """
    found = there = find(root, key, verify=verify)
    if found is None:
        store(root, key, write)
        found = find(root, key, verify=False)
    if found is None:
        raise DataError(
            f"{root / key} was written and is gone. Name a folder that nobody clears: --data_cache_dir.",
            code="data.cache_entry_gone",
        )
    return *found, there is not None


def store(root: Path, key: str, write: Callable[[Path], tuple[int, Mapping[str, Any]]]) -> None:
    """Make an entry: `write` writes the rows to the path it is given, and returns how many, and their account.

    Raises:
        DataError: the folder can't be written to; and what `write` raises. No trace is left.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        with tempfile.TemporaryDirectory(prefix=f"{_making()}{os.getpid()}-", dir=root, ignore_cleanup_errors=True) as top:
            made = Path(top) / key
            made.mkdir()
            rows, account = write(made / ROWS)
            told = {"rows": rows, "account": account, "crc32": _checksum(made / ROWS, account)}
            (made / ACCOUNT).write_text(json.dumps(told), encoding="utf-8")
            for each in made.iterdir():
                _flush(each)
            _take_place(made, root / key)
    except OSError as error:
        raise DataError(
            f"can't keep prepared data in {root}: {error.strerror or error}. Name a folder with room: --data_cache_dir.",
            code="data.cache_unwritable",
        ) from error


def _take_place(made: Path, place: Path) -> None:
    try:
        made.rename(place)
    except OSError:
        if (place / ACCOUNT).exists():  # another was first, with the same rows
            return
        shutil.rmtree(place, ignore_errors=True)  # what is left of an entry that was cleared away
        made.rename(place)


def _making() -> str:
    """How folders begin that are being written where this process's number is known: on this machine, in this container."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{_MAKING}{socket.gethostname()}-{space}-"


def _remove_abandoned(root: Path) -> None:
    """What writers that were killed have left: those of this machine at once, others' when it is surely theirs."""
    for each in root.glob(f"{_MAKING}*"):
        with contextlib.suppress(FileNotFoundError):
            process = each.name.removeprefix(_making()).split("-")[0]
            gone = each.name.startswith(_making()) and process.isdecimal() and not Path(f"/proc/{process}").exists()
            if gone or time.time() - each.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(each, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
