"""The layout of a checkpoint to be written: the file and the offset of each tensor. Pure, and the same on every rank.

Files are filled in the model's order up to a maximum size, as in transformers. A larger tensor gets a separate file.
Headers follow the safetensors format. They are padded with spaces to a multiple of 8 bytes, so that the data is aligned.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from zero_sft.checkpoint.header import StoredTensor, tensor_nbytes
from zero_sft.checkpoint.index import SINGLE_FILE

MAX_FILE_BYTES = 5 * 10**9

TensorRow = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file to be written: the bytes of its header, its tensors with their offsets, and its size in bytes."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    nbytes: int


def lay_out(tensors: Iterable[TensorRow], max_file_bytes: int = MAX_FILE_BYTES) -> tuple[FileLayout, ...]:
    """Assign tensors to files."""
    groups: list[list[TensorRow]] = []
    filled_bytes = 0
    for tensor in tensors:
        nbytes = tensor_nbytes(*tensor[1:])
        if not groups or (groups[-1] and filled_bytes + nbytes > max_file_bytes):
            groups.append([])
            filled_bytes = 0
        groups[-1].append(tensor)
        filled_bytes += nbytes
    if len(groups) == 1:
        return (lay_out_file(SINGLE_FILE, groups[0]),)
    count = len(groups)
    return tuple(lay_out_file(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, start=1))


def index_json(files: Iterable[FileLayout]) -> str:
    """Return the text of `model.safetensors.index.json` for several files."""
    placed = [(tensor, file.name) for file in files for tensor in file.tensors]
    metadata = {"total_size": sum(tensor.nbytes for tensor, _ in placed)}
    return json.dumps({"metadata": metadata, "weight_map": {tensor.name: file for tensor, file in placed}}, indent=2) + "\n"


def lay_out_file(file: str, rows: Iterable[TensorRow], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Lay out one file. `metadata` is added to the header's `__metadata__`."""
    tensors: list[StoredTensor] = []  # with offsets from the start of the data
    data_bytes = 0
    for name, dtype, shape in rows:
        nbytes = tensor_nbytes(dtype, shape)
        tensors.append(StoredTensor(name=name, file=file, dtype=dtype, shape=shape, offset_bytes=data_bytes, nbytes=nbytes))
        data_bytes += nbytes
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for tensor in tensors:
        offsets = [tensor.offset_bytes, tensor.offset_bytes + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = tuple(replace(tensor, offset_bytes=start + tensor.offset_bytes) for tensor in tensors)
    return FileLayout(name=file, header=struct.pack("<Q", len(text)) + text, tensors=placed, nbytes=start + data_bytes)
