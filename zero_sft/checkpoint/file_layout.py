"""The layout of a checkpoint to be written: the file and the offset of each tensor. Pure, and the same on every rank.

Files are filled in the model's order up to a maximum size, as in transformers. A larger tensor gets a separate file.
Headers follow the safetensors format. They are padded with spaces to a multiple of 8 bytes, so that the data is aligned.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zero_sft.checkpoint.header import ITEM_BITS, StoredTensor
from zero_sft.checkpoint.index import SINGLE_FILE

MAX_FILE_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file to be written: the bytes of its header, its tensors with their offsets, and its size in bytes."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    nbytes: int


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[FileLayout, ...]:
    """Assign tensors, each a tuple (name, dtype, shape), to files."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = []
    filled_bytes = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor[1], tensor[2])
        if not groups or (groups[-1] and filled_bytes + nbytes > max_file_bytes):
            groups.append([])
            filled_bytes = 0
        groups[-1].append(tensor)
        filled_bytes += nbytes
    if len(groups) == 1:
        return (_file(SINGLE_FILE, groups[0]),)
    count = len(groups)
    return tuple(_file(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, start=1))


def index_json(files: Iterable[FileLayout]) -> str:
    """Return the text of `model.safetensors.index.json` for several files."""
    files = tuple(files)
    metadata: Mapping[str, int] = {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)}
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def _file(file: str, group: list[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    header: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for name, dtype, shape in group:
        end = begin + _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    offset_bytes = 8 + len(text)
    stored: list[StoredTensor] = []
    for name, dtype, shape in group:
        nbytes = _nbytes(dtype, shape)
        stored.append(StoredTensor(name=name, file=file, dtype=dtype, shape=shape, offset_bytes=offset_bytes, nbytes=nbytes))
        offset_bytes += nbytes
    return FileLayout(name=file, header=struct.pack("<Q", len(text)) + text, tensors=tuple(stored), nbytes=offset_bytes)
