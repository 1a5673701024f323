"""ZeRO-3's arithmetic: which flat range of a parameter a rank keeps.

Of a parameter of `numel` elements in row-major order, rank `r` of `N` keeps `[r*p, (r+1)*p)` with `p = ceil(numel / N)`. The
last ranks' ranges may run past the end: what lies beyond `numel` is padding that no file has. Worked example, numel 10, N 4:
`p = 3`, ranges [0,3) [3,6) [6,9) [9,12), of which the last has one element and two of padding; numel 2, N 4: `p = 1`, ranks
2 and 3 hold padding alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRange:
    """The half-open range `[start, stop)` of a parameter's elements that are real on a rank, and its size with padding."""

    start: int
    stop: int
    padded_numel: int

    @property
    def numel(self) -> int:
        """Real elements, `0 <= numel <= padded_numel`."""
        return self.stop - self.start


def partition_numel(numel: int, world_size: int) -> int:
    """Elements that every rank keeps of a parameter, padding included."""
    return -(-numel // world_size)


def shard_range(numel: int, rank: int, world_size: int) -> FlatRange:
    """The range of a parameter that `rank` of `world_size` keeps."""
    size = partition_numel(numel, world_size)
    start = min(rank * size, numel)
    return FlatRange(start=start, stop=min(start + size, numel), padded_numel=size)


def full_range(numel: int) -> FlatRange:
    """The range of a tensor that every rank keeps whole: a buffer, or a parameter outside ZeRO."""
    return FlatRange(start=0, stop=numel, padded_numel=numel)
