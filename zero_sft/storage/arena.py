"""One block of memory per dtype and device, from which the shards of a rank are cut.

First touch of fresh pages costs more than the copy itself, so the block is touched once, by the reads themselves, and never
before. On the CPU it is anonymous memory straight from the kernel: zeroed, so that padding needs no work; the size of its
pages is chosen while it is filled (`pages.py`). Every cut starts on a 512-byte boundary, as vectorised kernels, O_DIRECT and
NCCL like it.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zero_sft.storage import accelerator

ALIGNMENT_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSlot:
    """A flat tensor to be cut from an arena: `numel` elements of `dtype` on `device`, pinned if it is host memory for DMA."""

    name: str
    numel: int
    dtype: torch.dtype
    device: torch.device
    pinned: bool = False


def allocate(slots: Sequence[ArenaSlot]) -> Mapping[str, torch.Tensor]:
    """Cut a zeroed flat tensor for every slot, one arena per (dtype, device, pinned)."""
    groups: dict[tuple, list[ArenaSlot]] = {}
    for slot in slots:
        groups.setdefault((slot.dtype, slot.device, slot.pinned), []).append(slot)
    tensors: dict[str, torch.Tensor] = {}
    for (dtype, device, pinned), members in groups.items():
        step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        starts, total = [], 0
        for slot in members:
            starts.append(total)
            total += -(-slot.numel // step) * step
        block = _block(total, dtype, device, pinned)
        for slot, start in zip(members, starts, strict=True):
            tensors[slot.name] = _cut(block, start, slot.numel)
    return tensors


def _cut(block: torch.Tensor, start: int, numel: int) -> torch.Tensor:
    """A part of a block that is no view of it: a view keeps its whole base alive, even when its `data` lies elsewhere.

    DeepSpeed moves every shard into memory of its own when an engine starts, by its `data`; the arena is free then.
    """
    return torch.empty(0, dtype=block.dtype, device=block.device).set_(block.untyped_storage(), start, (numel,), (1,))


def _block(numel: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> torch.Tensor:
    if device.type != "cpu" or numel == 0:
        return torch.zeros(numel, dtype=dtype, device=device)
    if pinned:
        return accelerator.pinned_zeros(numel, dtype)
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)  # holds the mapping until the last view is gone
