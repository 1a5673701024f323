"""The plan of one rank: targets × sources → reads.

A target is what a rank must fill (a shard or a whole tensor); its sources say which stored elements make it, as runs that are
contiguous on both sides. The plan cuts each run to the target's range and turns it into bytes of a file. Nothing here reads,
allocates or communicates, so any rank of any world can be played without processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import FlatRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`numel` consecutive elements of a target, from `target_start`: those of stored tensor `source` from `source_start`."""

    target_start: int
    source: str
    source_start: int
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a rank fills: the elements `span` of the tensor `name`, which has `numel` elements in all."""

    name: str
    numel: int
    span: FlatRange
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """`nbytes` bytes from `offset_bytes` of `file`, elements of `dtype`, go to element `start` of the target's local part."""

    file: str
    offset_bytes: int
    nbytes: int
    dtype: str
    target: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All reads of one rank, in file order."""

    reads: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank reads."""
        return sum(read.nbytes for read in self.reads)


def plan_reads(targets: Sequence[Target], stored: Mapping[str, StoredTensor]) -> Plan:
    """Turn what a rank must fill into reads, sorted by file and offset.

    Raises:
        CheckpointError: runs that leave a gap in a target or overlap, or go past the end of their source.
    """
    reads: list[Read] = []
    for target in targets:
        _check_cover(target)
        for run in target.runs:
            read = _cut(target, run, stored[run.source])
            if read is not None:
                reads.append(read)
    return Plan(reads=tuple(sorted(reads, key=lambda read: (read.file, read.offset_bytes, read.target))))


def _check_cover(target: Target) -> None:
    """The runs of a target, in order, must cover `[0, numel)` exactly: an element left out would stay uninitialised."""
    position = 0
    for run in target.runs:
        if run.target_start != position:
            raise CheckpointError(f"{target.name}: sources cover up to element {position}, the next at {run.target_start}")
        position += run.numel
    if position != target.numel:
        raise CheckpointError(f"{target.name}: sources have {position} elements, expected {target.numel}")


def _cut(target: Target, run: Run, source: StoredTensor) -> Read | None:
    """The part of `run` inside the target's span, or None. Worked example: span [3,6), run of 5 from 2 → elements 3, 4, 5."""
    start = max(run.target_start, target.span.start)
    stop = min(run.target_start + run.numel, target.span.stop)
    if start >= stop:
        return None
    source_start = run.source_start + start - run.target_start
    if source_start + stop - start > source.numel:
        raise CheckpointError(f"{target.name}: reads past the end of {source.name} in {source.file}")
    return Read(
        file=source.file,
        offset_bytes=source.offset_bytes + source_start * source.itemsize,
        nbytes=(stop - start) * source.itemsize,
        dtype=source.dtype,
        target=target.name,
        start=start - target.span.start,
    )
