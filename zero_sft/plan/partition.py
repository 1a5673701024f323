"""ZeRO-3's partition: the flat range of a parameter that each rank keeps.

A parameter has `numel` elements in row-major order. Rank `r` of `N` keeps `[r*p, (r+1)*p)`, where `p = ceil(numel / N)`. The
ranges of the last ranks may run past `numel`: the rest is padding, which no file contains. Worked examples: numel 10, N 4 gives
`p = 3` and ranges [0,3) [3,6) [6,9) [9,12), where the last has one real element and two of padding. numel 2, N 4 gives `p = 1`,
and ranks 2 and 3 hold only padding.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRange:
    """The range `[start, stop)` of a parameter's real elements on a rank, without padding."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements, 0 or more."""
        return self.stop - self.start


def partition_numel(numel: int, world_size: int) -> int:
    """Return the number of elements of a parameter that every rank keeps, padding included."""
    return -(-numel // world_size)


def shard_range(numel: int, rank: int, world_size: int) -> FlatRange:
    """Return the range of a parameter that `rank` keeps."""
    size = partition_numel(numel, world_size)
    start = min(rank * size, numel)
    return FlatRange(start=start, stop=min(start + size, numel))


def full_range(numel: int) -> FlatRange:
    """Return the range of a whole tensor, for what every rank keeps in full: a buffer, or a parameter outside ZeRO."""
    return FlatRange(start=0, stop=numel)
