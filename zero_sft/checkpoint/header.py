"""The header of one safetensors file: the byte range of each tensor.

A safetensors file is `u64 little-endian header length | JSON header | data`. The JSON maps each tensor's name to its dtype,
shape and `data_offsets = [begin, end)` within the data. The data is row-major, has no gaps, and ends where the file ends
(https://github.com/huggingface/safetensors, "Format"). Everything that a truncated or corrupt file can violate is checked
here, before any data is read, since no later step would notice it. The `safetensors` library does not report offsets.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from zero_sft.checkpoint.file_identity import explain_read_errors
from zero_sft.checkpoint.folder_kind import describe_placeholder
from zero_sft.errors import CheckpointError

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of each dtype, by the names that the safetensors format uses."""

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format sets. It prevents a huge allocation if the length field is garbage."""

_LENGTH = struct.Struct("<Q")


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor without gaps."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint: `nbytes` bytes at `offset_bytes` of `file`.

    It is row-major if `strides` (in elements) is None. A `.bin` file stores views with the strides that they had.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    def to_row(self) -> list[Any]:
        """Return all fields except the file, for JSON."""
        return [self.name, self.dtype, self.shape, self.offset_bytes, self.nbytes, self.strides]

    @classmethod
    def from_row(cls, file: str, row: Sequence[Any]) -> "StoredTensor":
        """Rebuild the tensor of `file` from the result of `to_row`."""
        name, dtype, shape, offset_bytes, nbytes, strides = row
        shape, strides = tuple(shape), None if strides is None else tuple(strides)
        return cls(name=name, file=file, dtype=dtype, shape=shape, offset_bytes=offset_bytes, nbytes=nbytes, strides=strides)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element. Valid only for dtypes of whole bytes."""
        return ITEM_BITS[self.dtype] // 8


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is not a safetensors file, is truncated, or has offsets that contradict its shapes or size.
    """
    path = str(path)
    text, size_bytes = _read_text(path)
    data_start_bytes = _LENGTH.size + len(text)
    tensors = _parse(path, text, data_start_bytes)
    _require_contiguous(path, tensors, data_start_bytes=data_start_bytes, size_bytes=size_bytes)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts under `__metadata__` in the header of a safetensors file.

    Raises:
        CheckpointError: the file is not a safetensors file.
    """
    metadata = _parse_json(str(path), _read_text(str(path))[0]).get("__metadata__")
    return cast("dict[str, str]", metadata) if isinstance(metadata, dict) else {}


def _read_text(path: str) -> tuple[bytes, int]:
    """Return the JSON of a file's header, and the file's size in bytes."""
    with explain_read_errors(path), Path(path).open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(_LENGTH.size)
        header_nbytes = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if placeholder := describe_placeholder(Path(path)):
            raise CheckpointError(placeholder, code="checkpoint.placeholder_file")
        if not 2 <= header_nbytes <= min(MAX_HEADER_BYTES, size_bytes - _LENGTH.size):
            raise CheckpointError(
                _damaged(path, f"a header of {header_nbytes} bytes in a file of {size_bytes} bytes"),
                code="checkpoint.header_too_long",
            )
        return file.read(header_nbytes), size_bytes


def _parse(path: str, text: bytes, data_start_bytes: int) -> list[StoredTensor]:
    entries = _parse_json(path, text)
    return [_entry(path, name, raw, data_start_bytes) for name, raw in entries.items() if name != "__metadata__"]


def _parse_json(path: str, text: bytes) -> dict[str, Any]:
    try:
        header: Any = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            _damaged(path, f"a header that is not JSON ({error})"), code="checkpoint.header_not_json"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(_damaged(path, "a header that is not a JSON object"), code="checkpoint.header_not_an_object")
    return cast("dict[str, Any]", header)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: str, name: str, raw: Any, data_start_bytes: int) -> StoredTensor:
    try:
        dtype, shape = str(raw["dtype"]), tuple(raw["shape"])
        begin, end = raw["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("negative or fractional numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            _damaged(path, f"an invalid entry for {name!r} ({error})"), code="checkpoint.header_bad_entry"
        ) from error
    if dtype not in ITEM_BITS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype!r}, expected one of {', '.join(ITEM_BITS)}.",
            code="checkpoint.unknown_dtype",
        )
    expected_nbytes = tensor_nbytes(dtype, shape)
    if end - begin != expected_nbytes:
        problem = f"{end - begin} bytes for {name!r}, but {dtype} {list(shape)} takes {expected_nbytes}"
        raise CheckpointError(_damaged(path, problem), code="checkpoint.wrong_size_of_tensor")
    return StoredTensor(
        name=name, file=path, dtype=dtype, shape=shape, offset_bytes=data_start_bytes + begin, nbytes=end - begin
    )


def _require_contiguous(path: str, tensors: list[StoredTensor], data_start_bytes: int, size_bytes: int) -> None:
    position = data_start_bytes
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset_bytes, tensor.nbytes)):
        if tensor.offset_bytes != position:
            raise CheckpointError(
                _damaged(path, f"{tensor.name!r} at byte {tensor.offset_bytes}, expected at {position}"),
                code="checkpoint.tensors_overlap",
            )
        position += tensor.nbytes
    if position != size_bytes:
        raise CheckpointError(
            _damaged(path, f"{size_bytes} bytes, but its header describes {position}"), code="checkpoint.truncated"
        )


def _damaged(path: str, problem: str) -> str:
    return (
        f"{path} is truncated, corrupt or not a safetensors file: found {problem}. "
        "Download or copy the file again, and compare its size and checksum with the original."
    )
