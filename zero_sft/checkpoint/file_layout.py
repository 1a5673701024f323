"""The layout of a checkpoint to be written: which tensor goes into which file, and where. Pure, the same on every rank.

Files are filled in the model's order up to a size, as transformers does it; a tensor larger than that gets a file of its own.
Headers follow the safetensors format, padded with spaces to 8 bytes, so that data starts aligned.
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
    """One file to be written: its header's bytes, its tensors with their places, its size in bytes."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    nbytes: int


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[FileLayout, ...]:
    """Assign tensors, given as (name, dtype, shape), to files."""
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
    """The text of `model.safetensors.index.json` over several files."""
    files = tuple(files)
    metadata: Mapping[str, int] = {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)}
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def _file(name: str, group: list[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    header: dict[str, object] = {"__metadata__": _METADATA}
    position = 0
    for tensor, dtype, shape in group:
        end = position + _nbytes(dtype, shape)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = []
    for tensor, dtype, shape in group:
        nbytes = _nbytes(dtype, shape)
        places.append(StoredTensor(name=tensor, file=name, dtype=dtype, shape=shape, offset_bytes=start, nbytes=nbytes))
        start += nbytes
    return FileLayout(name=name, header=struct.pack("<Q", len(text)) + text, tensors=tuple(places), nbytes=start)
