"""Compute the tensors whose conversion can't be traced, once per node, from whole stored tensors.

The first rank of each node reads one group's stored tensors and runs transformers' operations on them. The node's ranks map the
results from shared memory and copy their ranges. A node never holds more than one group's sources and results.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.cluster.node_layout import SHARED_MEMORY
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.convert import FullShapeModel, convert_group
from zero_sft.conversion.keys import TensorGroup
from zero_sft.loading.match import CheckpointMatch
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import ReadItem, SourceMap, plan_reads
from zero_sft.plan.regions import identity_regions
from zero_sft.storage import reader
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.zero import shards


def materialize(
    group: TensorGroup, model: FullShapeModel, index: CheckpointIndex
) -> tuple[dict[str, torch.Tensor], list[ReadItem]]:
    """Read a group's stored tensors whole and run its operations; return the results and the reads.

    Any rank; does not communicate.
    """
    all_reads: list[ReadItem] = []

    def read_tensor(name: str) -> torch.Tensor:
        stored = index.tensors[name]
        tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
        source_map = SourceMap.of(name, stored.shape, identity_regions(name, stored.shape, strides=stored.strides))
        reads = plan_reads([(source_map, full_range(stored.numel))], index.tensors)
        reader.fill(reads, {name: tensor.view(-1)}, identities=index.identities)
        all_reads.extend(reads)
        return tensor

    return convert_group(group, model, read_tensor), all_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeCosts:
    """Costs of `fill_untraceable`: the reads of this rank, and for each tensor the bytes that a node held meanwhile."""

    reads: Sequence[ReadItem]
    held_bytes: Mapping[str, int]


def fill_untraceable(
    match: CheckpointMatch, tensors: Mapping[str, Any], already_complete: Set[str], world: World
) -> ComputeCosts:
    """Fill the shards of the tensors that can't be traced, group by group. Every rank; communicates.

    `tensors` are the model's parameters by name. The names in `already_complete` are skipped.
    """
    reads, held_bytes = [], {}
    groups = list(match.resolution.by_group())
    for group, names in progress.iterate_with_progress(groups, "computing tensors, once per node", "groups"):
        to_fill = [name for name in names if name not in already_complete and shards.is_sharded(tensors[name])]
        if not to_fill:
            continue
        results: dict[str, torch.Tensor] | None = None
        with collective_stage(world, f"computing {to_fill[0]}"):
            if world.leads_node:
                results, group_reads = materialize(group, match.full_shape_model, match.index)
                reads.extend(group_reads)
        with shared(results, to_fill, world) as full:
            results = None  # the node keeps one copy, in shared memory

            def copy_ranges(memory: Mapping[str, torch.Tensor], full: Mapping[str, torch.Tensor] = full) -> None:
                for name, shard in memory.items():
                    flat_range = shards.local_range(tensors[name])
                    shard[: flat_range.numel].copy_(full[name].reshape(-1)[flat_range.start : flat_range.stop])

            with collective_stage(world, f"keeping {to_fill[0]}"):
                shards.fill_shards({name: tensors[name] for name in to_fill}, copy_ranges)
        source_bytes = sum(match.index.tensors[name].nbytes for name in group.stored_names)
        result_bytes = sum(match.skeleton.state[name].numel() * match.skeleton.state[name].itemsize for name in to_fill)
        held_bytes |= dict.fromkeys(to_fill, source_bytes + result_bytes)
    return ComputeCosts(reads=reads, held_bytes=held_bytes)


@contextlib.contextmanager
def shared(tensors: Mapping[str, torch.Tensor] | None, names: Sequence[str], world: World) -> Iterator[dict[str, torch.Tensor]]:
    """Map the tensors that the node's first rank computed into every rank of the node. Every rank; communicates.

    The file is removed when the body ends; the memory is freed when its last mapping is gone.

    Args:
        tensors: the computed tensors on the node's first rank, None on the others.
    """
    path: Path | None = None
    try:
        with collective_stage(world, "sharing what was computed") as exchange:
            if tensors is not None:
                path = _new_file(sum(tensors[name].nbytes for name in names))
                save_file({name: tensors[name].contiguous() for name in names}, path)
                exchange.local = str(path)
        shared_path = exchange.gathered[world.node_leader]
        with collective_stage(world, "mapping what was computed"), safe_open(shared_path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in names}
        yield mapped
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _new_file(nbytes: int) -> Path:
    """Create a file in shared memory, or on disk if shared memory is too small."""
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * nbytes
    handle, name = tempfile.mkstemp(prefix="zero_sft-", dir=SHARED_MEMORY if has_room else None)
    os.close(handle)
    return Path(name)
