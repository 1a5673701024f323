"""Positioned writes of a tensor's bytes: the reader run backwards."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from zero_sft.plan.plan import CopySpec
from zero_sft.storage.accelerator import bytes_view

STAGING_BYTES = 16 * 2**20


def write_at(handle: int, path: Path, flat: torch.Tensor, offset_bytes: int) -> None:
    """Write the flat tensor `flat` at `offset_bytes` of the open file. From a device it passes the host in bounded parts.

    Raises:
        OSError: with the file's name.
    """
    step = STAGING_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        part = flat.detach().narrow(0, start, min(step, flat.numel() - start)).to("cpu").contiguous()
        view = bytes_view(part)
        position = 0
        while position < len(view):
            try:
                position += os.pwrite(handle, view[position:], offset_bytes + start * flat.element_size() + position)
            except OSError as error:
                error.filename = str(path)
                raise


def write_piece(handle: int, path: Path, flat: torch.Tensor, piece: CopySpec, offset_bytes: int) -> None:
    """Write what a load would read as `piece`: elements of `flat` to where they stand in the tensor at `offset_bytes`.

    Only the piece's own bytes are written, run by run: what lies between them belongs to another rank.

    Raises:
        OSError: with the file's name.
    """
    dims = sorted(zip(piece.source_strides, piece.sizes, piece.target_strides, strict=True), reverse=True)
    for stored, own, sizes, walk in _runs(dims, STAGING_BYTES // flat.element_size()):
        start = flat.storage_offset() + piece.target_start + own
        run = flat.as_strided(sizes, walk, start).reshape(-1)
        write_at(handle, path, run, offset_bytes + (piece.source_start + stored) * flat.element_size())


def _runs(dims: list[tuple[int, int, int]], limit: int) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Split (stored stride, size, own stride) dimensions, the coarsest first, into runs that are stored without a gap.

    Gives where each run starts, there and here, and its sizes and strides here. A run that is not contiguous here has at most
    `limit` elements, since it is copied together first.
    """
    reach, first = 1, len(dims)
    while first and (dims[first - 1][0] == reach or dims[first - 1][1] == 1):
        reach *= dims[first - 1][1]
        first -= 1
    while first < len(dims) and reach > limit and not _is_contiguous(dims[first:]):
        reach //= dims[first][1]
        first += 1
    outer, inner = dims[:first], dims[first:]
    sizes, walk = [size for _, size, _ in inner], [step for _, _, step in inner]
    for index in range(math.prod(size for _, size, _ in outer)):
        stored = own = 0
        for stride, size, step in reversed(outer):
            index, i = divmod(index, size)
            stored, own = stored + i * stride, own + i * step
        yield stored, own, sizes, walk


def _is_contiguous(dims: list[tuple[int, int, int]]) -> bool:
    return all(stride == step for stride, size, step in dims if size > 1)
