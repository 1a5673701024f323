"""Positioned writes of a tensor's bytes: the reverse of the reader."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from zero_sft.checkpoint.checksum import PartialChecksum
from zero_sft.plan.plan import CopyDim, CopySpec
from zero_sft.storage.dtypes import bytes_view

MAX_PART_BYTES = 16 * 2**20
"""The largest part of a tensor that is copied to the host, or made contiguous, before it is written."""

_ALONE_BYTES = 2**20
_CHECKSUMS = ThreadPoolExecutor(1, thread_name_prefix="checksum")
"""Computes the checksum of a part of at least `_ALONE_BYTES` while it is being written; both let go of the interpreter."""


def write_at(handle: int, path: Path, flat: torch.Tensor, offset_bytes: int, checksum: PartialChecksum | None = None) -> None:
    """Write the flat tensor `flat` at `offset_bytes` of an open file. Device tensors are copied to the host in bounded parts.

    What was written is added to `checksum`.

    Raises:
        OSError: the write failed; the error names the file.
    """
    step = MAX_PART_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        part = flat.detach().narrow(0, start, min(step, flat.numel() - start)).to("cpu").contiguous()
        view, part_offset = bytes_view(part), offset_bytes + start * flat.element_size()
        if checksum is None:
            _write_all(handle, path, view, part_offset)
        elif len(view) < _ALONE_BYTES:
            checksum.add(part_offset, view)
            _write_all(handle, path, view, part_offset)
        else:
            added = _CHECKSUMS.submit(checksum.add, part_offset, view)
            try:
                _write_all(handle, path, view, part_offset)
            finally:
                added.result()  # before the tensor may change


def _write_all(handle: int, path: Path, view: memoryview, offset_bytes: int) -> None:
    position = 0
    while position < len(view):
        try:
            position += os.pwrite(handle, view[position:], offset_bytes + position)
        except OSError as error:
            error.filename = str(path)
            raise
    if len(view) >= _ALONE_BYTES and hasattr(os, "posix_fadvise"):
        # Linux begins to write these pages to disk, while the next ones are copied; otherwise it would wait for the sync.
        os.posix_fadvise(handle, offset_bytes, len(view), os.POSIX_FADV_DONTNEED)


def write_copy(
    handle: int, path: Path, flat: torch.Tensor, piece: CopySpec, offset_bytes: int, checksum: PartialChecksum | None = None
) -> None:
    """Write the elements of `flat` that a load would read with `piece` into the stored tensor at `offset_bytes`.

    Each contiguous run is written separately, because the bytes between runs belong to other ranks. What was written is added
    to `checksum`.

    Raises:
        OSError: a write failed; the error names the file.
    """
    dims = sorted(piece.dims, key=lambda dim: dim.source_stride, reverse=True)
    for stored_offset, local_offset, sizes, strides in _runs(dims, MAX_PART_BYTES // flat.element_size()):
        start = flat.storage_offset() + piece.target_start + local_offset
        run = flat.as_strided(sizes, strides, start).reshape(-1)
        write_at(handle, path, run, offset_bytes + (piece.source_start + stored_offset) * flat.element_size(), checksum)


def _runs(dims: list[CopyDim], limit: int) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Split a copy into runs that are stored without gaps. Yields (stored offset, local offset, local sizes, local strides).

    The source of a dimension is the stored tensor, its target is local memory; the coarsest dimension comes first. A run that
    is not contiguous in local memory has at most `limit` elements, because it has to be copied before it is written.
    """
    run_numel, first = 1, len(dims)
    while first and (dims[first - 1].source_stride == run_numel or dims[first - 1].size == 1):
        run_numel *= dims[first - 1].size
        first -= 1
    while first < len(dims) and run_numel > limit and not _is_contiguous(dims[first:]):
        run_numel //= dims[first].size
        first += 1
    outer, inner = dims[:first], dims[first:]
    sizes, strides = [dim.size for dim in inner], [dim.target_stride for dim in inner]
    for index in range(math.prod(dim.size for dim in outer)):
        stored_offset = local_offset = 0
        for dim in reversed(outer):
            index, i = divmod(index, dim.size)
            stored_offset, local_offset = stored_offset + i * dim.source_stride, local_offset + i * dim.target_stride
        yield stored_offset, local_offset, sizes, strides


def _is_contiguous(dims: list[CopyDim]) -> bool:
    return all(dim.source_stride == dim.target_stride for dim in dims if dim.size > 1)
