"""A copy of what this rank writes to a checkpoint, in host memory, so that training goes on while a thread writes it.

The memory is allocated once and kept for the next checkpoints: the first touch of fresh pages takes longer than the copy, and
page-locked memory, from which devices copy fast, takes longer still.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.file_layout import FileLayout
from zero_sft.saving.optimizer_files import WEIGHT, state_sizes, stored_name
from zero_sft.saving.weight_files import WeightPart, part_sizes
from zero_sft.storage import accelerator, arena
from zero_sft.zero.optimizer_state import ParameterState

BLOCK_BYTES = 2**30
"""Bytes of a block of memory. torch rounds each block that it page-locks up to a power of two, so one block would take much
more than it holds."""

Sizes = Mapping[str, tuple[int, torch.dtype]]
"""The number of elements and the dtype of each flat tensor, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedParts:
    """Copies of the parts that `weight_parts` and `parameter_states` yield. Only the next copy changes them."""

    weights: tuple[WeightPart, ...]
    states: tuple[ParameterState, ...]


def copy_sizes(tensors: Mapping[str, Any], optimizer: FileLayout, *, is_main: bool) -> Sizes:
    """Return the sizes of this rank's parts of the model's `tensors` and of the optimizer's state. Any rank."""
    weights = {stored_name(WEIGHT, name): (numel, dtype) for name, numel, dtype in part_sizes(tensors, is_main=is_main)}
    return weights | state_sizes(optimizer)


def copy_nbytes(sizes: Sizes, folder: Path | None = None) -> int:
    """Return the bytes that a copy of these sizes takes: if they are page-locked, each block takes a power of two.

    Args:
        folder: as in `HostCopy`.
    """
    blocks = [sum(sizes[name][0] * sizes[name][1].itemsize for name in names) for names in _blocks(sizes)]
    is_pinned = folder is None and accelerator.accelerator().device_name() != "cpu"
    return sum(1 << max(0, nbytes - 1).bit_length() for nbytes in blocks) if is_pinned else sum(blocks)


class HostCopy:
    """Memory for a copy of tensors of the given sizes; page-locked if there is an accelerator.

    Args:
        folder: a folder on a disk of this node, which holds the copy instead: its memory is the file cache.

    Raises:
        MemoryError, RuntimeError, OSError: there is not enough memory.
    """

    def __init__(self, sizes: Sizes, folder: Path | None = None) -> None:
        self.sizes = sizes
        pinned = folder is None and accelerator.accelerator().device_name() != "cpu"
        self._memory: dict[str, torch.Tensor] = {}
        for names in _blocks(sizes):
            self._memory |= arena.allocate(
                [
                    arena.ArenaSlot(
                        name=name, numel=sizes[name][0], dtype=sizes[name][1], device=torch.device("cpu"), pinned=pinned
                    )
                    for name in names
                ],
                folder,
            )

    def take(self, parts: Iterable[WeightPart], states: Iterable[ParameterState]) -> CopiedParts:
        """Copy all parts, and return when they are in host memory. Any rank; does not communicate."""
        weights = tuple(
            dataclasses.replace(part, values=self._copied(stored_name(WEIGHT, part.name), part.values)) for part in parts
        )
        copied_states = tuple(
            dataclasses.replace(
                state,
                tensors={key: self._copied(stored_name(key, state.name), tensor) for key, tensor in state.tensors.items()},
            )
            for state in states
        )
        accelerator.accelerator().synchronize()
        return CopiedParts(weights=weights, states=copied_states)

    def _copied(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self._memory[name].copy_(values, non_blocking=accelerator.is_on_device(values))


def _blocks(sizes: Sizes, block_bytes: int = BLOCK_BYTES) -> Iterator[list[str]]:
    """Divide the tensors of each dtype into blocks of at most `block_bytes`, or one larger tensor."""
    for dtype in dict.fromkeys(dtype for _, dtype in sizes.values()):
        names: list[str] = []
        nbytes = 0
        for name, (numel, own_dtype) in sizes.items():
            if own_dtype != dtype:
                continue
            own = -(-numel * dtype.itemsize // arena.ALIGNMENT_BYTES) * arena.ALIGNMENT_BYTES
            if names and nbytes + own > block_bytes:
                yield names
                names, nbytes = [], 0
            names.append(name)
            nbytes += own
        if names:
            yield names
