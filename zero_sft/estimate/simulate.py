"""Play every rank of a load: what each would read, in how many requests, and how long a storage would take for it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from zero_sft.estimate.model import EstimatedModel
from zero_sft.estimate.storage_profiles import Storage
from zero_sft.plan.partition import shard_range
from zero_sft.plan.plan import FillTarget, plan_reads

THREADS = 4
"""Requests of one rank that are under way at a time: the reading threads of a load with its default buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """The reads of one rank: bytes, requests, the largest and the median request in bytes."""

    nbytes: int
    requests: int
    largest_bytes: int
    median_bytes: int


def simulate_load(of: EstimatedModel, world_size: int, ranks: Sequence[int] | None = None) -> list[RankLoad]:
    """Plan the load of every rank (or of those given) of a world, with the planner that a load uses.

    Raises:
        CheckpointError: a checkpoint that does not fill the model.
    """
    parameters = of.parameters
    wanted = [
        (source_map, parameters[name].numel()) for name, source_map in of.resolution.sources.items() if name in parameters
    ]
    result = []
    for rank in range(world_size) if ranks is None else ranks:
        targets = (
            FillTarget(source_map=source_map, flat_range=shard_range(numel, rank, world_size)) for source_map, numel in wanted
        )
        sizes = [read.total_nbytes for read in plan_reads(targets, of.resolution.stored).reads]
        result.append(
            RankLoad(
                nbytes=sum(sizes),
                requests=len(sizes),
                largest_bytes=max(sizes, default=0),
                median_bytes=int(statistics.median(sizes)) if sizes else 0,
            )
        )
    return result


def seconds(loads: Sequence[RankLoad], ranks_per_node: int, at: Storage) -> float:
    """How long the reads take: the bandwidth of the fullest node or of the whole storage, or the requests of one rank.

    Whatever is slowest hides the others, since requests overlap with one another. Worked example: 8 ranks of 2 GB on a node
    of 4 GB/s take 4 s; if each makes 40,000 requests of 1 ms, 4 at a time, 10 s.
    """
    firsts = range(0, len(loads), ranks_per_node)
    nodes = [sum(each.nbytes for each in loads[first : first + ranks_per_node]) for first in firsts]
    of_node = max(nodes) / at.node_gb_s / 1e9
    of_cluster = sum(nodes) / at.cluster_gb_s / 1e9 if at.cluster_gb_s else 0.0
    of_requests = max(each.requests for each in loads) * at.request_ms / 1e3 / THREADS
    return max(of_node, of_cluster, of_requests)
