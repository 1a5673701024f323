"""Arenas: one block of memory per dtype and device, in which the shards of a rank are placed.

The first touch of fresh pages costs more than the copy, so the reads are the first to touch the block. On the CPU the block is
anonymous memory from the kernel. It is zeroed, so padding needs no work, and its page size is chosen while it is filled
(`pages.py`). Every shard starts on a 512-byte boundary, which suits vectorised kernels, O_DIRECT and NCCL.
"""

import itertools
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zero_sft.storage import accelerator

ALIGNMENT_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSlot:
    """A flat tensor to be placed in an arena: `numel` elements of `dtype` on `device`; `pinned` for page-locked host memory."""

    name: str
    numel: int
    dtype: torch.dtype
    device: torch.device
    pinned: bool = False


def allocate(slots: Sequence[ArenaSlot], folder: Path | None = None) -> Mapping[str, torch.Tensor]:
    """Allocate a zeroed flat tensor for every slot, in one arena per (dtype, device, pinned).

    Args:
        folder: put the arenas of ordinary host memory on this folder's disk, in files without names.

    Raises:
        OSError: the disk has too little room.
    """
    groups: dict[tuple[torch.dtype, torch.device, bool], list[ArenaSlot]] = {}
    for slot in slots:
        groups.setdefault((slot.dtype, slot.device, slot.pinned), []).append(slot)
    tensors: dict[str, torch.Tensor] = {}
    for (dtype, device, pinned), members in groups.items():
        step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        starts = list(itertools.accumulate((-(-slot.numel // step) * step for slot in members), initial=0))
        block = _block(starts.pop(), dtype, device, pinned, folder)
        for slot, start in zip(members, starts, strict=True):
            tensors[slot.name] = _non_view(block, start, slot.numel)
    return tensors


def _non_view(block: torch.Tensor, start: int, numel: int) -> torch.Tensor:
    """Return a part of a block that shares its storage without being a view of it.

    When an engine starts, DeepSpeed moves every shard to other memory by assigning its `data`. A view would keep the whole
    block alive even then; a tensor that only shares the storage lets the arena be freed.
    """
    return torch.empty(0, dtype=block.dtype, device=block.device).set_(block.untyped_storage(), start, (numel,), (1,))


def _block(numel: int, dtype: torch.dtype, device: torch.device, pinned: bool, folder: Path | None) -> torch.Tensor:
    if device.type != "cpu" or numel == 0:
        return torch.zeros(numel, dtype=dtype, device=device)
    if pinned:
        return accelerator.pinned_zeros(numel, dtype)
    nbytes = numel * dtype.itemsize
    if folder is None:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a write to memory without a place on the disk would kill the process
            memory = mmap.mmap(file.fileno(), nbytes)
    return torch.frombuffer(memory, dtype=dtype)  # keeps the mapping alive while its storage is used
