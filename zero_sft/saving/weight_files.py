"""Write this rank's part of the weights into files that all ranks share: what a load of the same layout would read."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.checksum import PartialChecksum
from zero_sft.checkpoint.file_layout import FileLayout, index_json
from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.plan.partition import FlatRange, full_range
from zero_sft.plan.plan import SourceMap, copy_specs
from zero_sft.storage.writer import write_copy
from zero_sft.zero import shards


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPart:
    """The elements `flat_range` of the tensor `name`, flat, in the dtype in which they are saved."""

    name: str
    flat_range: FlatRange
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.values.numel() * self.values.element_size()


def weight_parts(tensors: Mapping[str, Any], *, is_main: bool) -> Iterator[WeightPart]:
    """Yield this rank's part of each tensor; tensors that are not sharded are rank 0's. A part is valid until the next one."""
    for name, tensor in tensors.items():
        if shards.is_sharded(tensor):
            with shards.current_values(tensor) as values:
                # A shard keeps its dtype when a partitioned model is cast.
                yield WeightPart(name=name, flat_range=shards.current_range(tensor), values=values.to(tensor.dtype))
        elif is_main:
            values = tensor.detach().contiguous().reshape(-1)
            yield WeightPart(name=name, flat_range=full_range(tensor.numel()), values=values)


def part_sizes(tensors: Mapping[str, Any], *, is_main: bool) -> Iterator[tuple[str, int, torch.dtype]]:
    """Yield name, number of elements and dtype of each part that `weight_parts` yields."""
    for name, tensor in tensors.items():
        if shards.is_sharded(tensor):
            yield name, shards.current_range(tensor).numel, tensor.dtype
        elif is_main:
            yield name, tensor.numel(), tensor.dtype


def part_nbytes(tensors: Mapping[str, Any], *, is_main: bool) -> int:
    """Return the bytes of the parts that `weight_parts` yields."""
    return sum(numel * dtype.itemsize for _, numel, dtype in part_sizes(tensors, is_main=is_main))


def write_headers(folder: Path, files: Sequence[FileLayout]) -> None:
    """Make the files in their full size, with headers and with space for the data. Rank 0."""
    for file in files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.nbytes)


def index_file(files: Sequence[FileLayout]) -> dict[str, bytes]:
    """Return the contents of the index by its name; nothing for one file, which needs none."""
    return {INDEX_FILE: index_json(files).encode()} if len(files) > 1 else {}


def write_parts(
    folder: Path,
    files: Sequence[FileLayout],
    source_maps: Mapping[str, SourceMap],
    parts: Iterable[WeightPart],
    *,
    checksums: Mapping[str, PartialChecksum] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write the parts to the elements from which a load would read them, and sync the files.

    Any rank; does not communicate.

    Args:
        source_maps: for each tensor, the stored elements that make it.
        checksums: for each file; what is written is added to them.
        advance: called with the number of bytes after each part.

    Raises:
        OSError: a write failed; the error names the file.
    """
    stored = {tensor.name: tensor for file in files for tensor in file.tensors}
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            handles[file.name] = os.open(folder / file.name, os.O_WRONLY)
            stack.callback(os.close, handles[file.name])
        for part in parts:
            for copy in copy_specs(source_maps[part.name], part.flat_range):
                tensor = stored[copy.source]
                path, checksum = folder / tensor.file, checksums[tensor.file] if checksums else None
                write_copy(handles[tensor.file], path, part.values, copy, tensor.offset_bytes, checksum)
            if advance is not None:
                advance(part.nbytes)
        for handle in handles.values():
            os.fsync(handle)
