"""Let rank 0 write a model's files alone, where the other ranks do not see its folder: block after block, no tensor in full."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.file_layout import FileLayout
from zero_sft.cluster.control_group import gather_tensors
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.plan.partition import FlatRange, partition_numel, shard_range
from zero_sft.plan.plan import SourceMap
from zero_sft.saving import weight_files
from zero_sft.saving.folder import explain_write_errors
from zero_sft.saving.weight_files import WeightPart
from zero_sft.zero import shards

BLOCK_BYTES = 256 * 2**20
"""Bytes that rank 0 receives at once, from all ranks together."""


def write_gathered(
    folder: Path,
    target: Path,
    files: Sequence[FileLayout],
    source_maps: Mapping[str, SourceMap],
    tensors: Mapping[str, Any],
    world: World,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write the tensors of the model on rank 0 into files that have their headers. Every rank; communicates.

    Args:
        folder: the files' folder, on rank 0.
        files, source_maps: as in `weight_files.write_parts`.
        target: the folder that an error names.
        tensors: the tensors of the model, by name.

    Raises:
        ExportError: rank 0 can't write.
    """
    parts = gathered_parts(tensors, world)
    error: Exception | None = None
    if world.is_main:
        try:
            weight_files.write_parts(folder, files, source_maps, parts, advance=advance)
        except OSError as caught:
            error = caught
    for _ in parts:  # rank 0, after an error as well: the others wait for it in the gathers
        pass
    with collective_stage(world, f"writing {target}"), explain_write_errors(target):
        if error is not None:
            raise error


def gathered_parts(tensors: Mapping[str, Any], world: World, block_bytes: int = BLOCK_BYTES) -> Iterator[WeightPart]:
    """Yield all ranks' parts of each tensor on rank 0, and nothing on the others. Every rank; communicates.

    A part is valid until the next one. All ranks must take all parts.
    """
    for part in weight_files.weight_parts(tensors, is_main=world.is_main):
        tensor = tensors[part.name]
        if not shards.is_sharded(tensor):
            yield part
            continue
        numel = math.prod(shards.current_shape(tensor))
        ranges = [shard_range(numel, rank, world.world_size) for rank in range(world.world_size)]
        longest = partition_numel(numel, world.world_size)
        block = max(1, block_bytes // (world.world_size * part.values.element_size()))
        for start in range(0, longest, block):
            size = min(block, longest - start)
            local = torch.zeros(size, dtype=part.values.dtype)
            own = part.values[start : start + size]
            local[: own.numel()].copy_(own)
            for held, received in zip(ranges, gather_tensors(world, local), strict=False):
                first, last = min(held.start + start, held.stop), min(held.start + start + size, held.stop)
                if first < last:
                    flat_range = FlatRange(start=first, stop=last)
                    yield WeightPart(name=part.name, flat_range=flat_range, values=received[: last - first])
