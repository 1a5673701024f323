"""Simulate the reads of every rank of a load: bytes, requests, and the seconds that a storage would take."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from zero_sft.console.progress import iterate_with_progress
from zero_sft.estimate.model import EstimatedModel
from zero_sft.estimate.storage_profiles import StorageProfile
from zero_sft.plan.partition import shard_range
from zero_sft.plan.plan import plan_reads

THREADS = 4
"""Concurrent requests of one rank: the number of reading threads of a load with default buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """Reads of one rank: bytes, number of requests, and the largest and median request in bytes."""

    nbytes: int
    requests: int
    largest_bytes: int
    median_bytes: int


def simulate_load(model: EstimatedModel, world_size: int) -> list[RankLoad]:
    """Plan the load for every rank of a world, with the planner of the loader.

    Raises:
        CheckpointError: the checkpoint does not fill the model.
    """
    parameters = model.parameters
    filled = [
        (source_map, parameters[name].numel())
        for name, source_map in model.resolution.source_maps.items()
        if name in parameters
    ]
    loads = []
    for rank in iterate_with_progress(range(world_size), f"planning the reads of {model.name}", "ranks"):
        targets = ((source_map, shard_range(numel, rank, world_size)) for source_map, numel in filled)
        sizes = [read.total_nbytes for read in plan_reads(targets, model.resolution.stored_tensors)]
        loads.append(
            RankLoad(
                nbytes=sum(sizes),
                requests=len(sizes),
                largest_bytes=max(sizes, default=0),
                median_bytes=int(statistics.median(sizes)) if sizes else 0,
            )
        )
    return loads


def load_seconds(loads: Sequence[RankLoad], ranks_per_node: int, profile: StorageProfile) -> float:
    """Return the seconds for all reads, limited by the busiest node's bandwidth, the storage's bandwidth, or the requests.

    The slowest of the three hides the others, because requests overlap. Worked example: 8 ranks of 2 GB on a node
    of 4 GB/s take 4 s; if each makes 40,000 requests of 1 ms, 4 at a time, 10 s.
    """
    starts = range(0, len(loads), ranks_per_node)
    node_bytes = [sum(load.nbytes for load in loads[start : start + ranks_per_node]) for start in starts]
    node_seconds = max(node_bytes) / profile.node_gb_s / 1e9
    cluster_seconds = sum(node_bytes) / profile.cluster_gb_s / 1e9 if profile.cluster_gb_s else 0.0
    request_seconds = max(load.requests for load in loads) * profile.request_ms / 1e3 / THREADS
    return max(node_seconds, cluster_seconds, request_seconds)
