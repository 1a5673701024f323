"""Find a rank's flat range in the shards that another number of ranks has saved.

Worked example: numel 10, saved by 4 ranks as [0,3) [3,6) [6,9) [9,10). Rank 1 of 3 keeps [4,8): elements 1 and 2 of saved rank
1's shard, then elements 0 and 1 of saved rank 2's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from zero_sft.plan.partition import FlatRange, partition_numel


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSpan:
    """`numel` consecutive elements: from `source_start` of saved rank `rank`'s shard to `target_start` of this rank's."""

    rank: int
    source_start: int
    target_start: int
    numel: int


def saved_spans(flat_range: FlatRange, numel: int, saved_world_size: int) -> Iterator[SavedSpan]:
    """Yield the spans of a parameter's saved shards that make `flat_range`, in order.

    Args:
        flat_range: the real elements that this rank keeps now.
        numel: number of elements of the parameter.
        saved_world_size: the number of ranks that saved it.
    """
    size = partition_numel(numel, saved_world_size)
    start = flat_range.start
    while start < flat_range.stop:
        rank = start // size
        stop = min(flat_range.stop, (rank + 1) * size)
        yield SavedSpan(rank=rank, source_start=start - rank * size, target_start=start - flat_range.start, numel=stop - start)
        start = stop
