"""The plan of one rank: targets × sources → reads.

A target is what a rank must fill (a shard or a whole tensor); the regions of its `SourceMap`, which is the same for all ranks,
say which stored elements make it. The plan cuts them to the target's flat range, and cuts what is left into reads, each one
range of a file whose elements are copied to where they belong. Nothing here reads, allocates or communicates, so any rank of
any world can be played without processes.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.scaled import ScaledTensor, ScaleRows
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import FlatRange
from zero_sft.plan.regions import Region, Regions, Shape, row_major

GAP_BYTES = 4096
"""Unwanted bytes between wanted ones that are read along, a page: the file system reads them anyway."""

SCATTER_BYTES = 8 * 2**20
"""The longest range that is read at a time where elements have to be put apart in memory, in bytes."""

SCALED_BYTES = 2**20
"""The same where elements are multiplied by scales, which takes some 16 bytes of memory for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMap:
    """Where the elements of the tensor `name` are stored: disjoint regions, sorted by their first flat element.

    A flat range finds its regions by bisection.

    Attributes:
        starts: the first flat element of each region, ascending.
        max_stops: for each region, one past the last flat element of all regions up to it.
    """

    name: str
    shape: Shape
    regions: Regions
    starts: tuple[int, ...]
    max_stops: tuple[int, ...]

    @classmethod
    def of(cls, name: str, shape: Shape, regions: Regions) -> "SourceMap":
        """Put the regions in order."""
        strides = row_major(shape)
        spans = [_flat_span(region, strides) for region in regions]
        order = sorted(range(len(regions)), key=lambda i: spans[i][0])
        return cls(
            name=name,
            shape=shape,
            regions=tuple(regions[i] for i in order),
            starts=tuple(spans[i][0] for i in order),
            max_stops=tuple(itertools.accumulate((spans[i][1] for i in order), max)),
        )

    def overlapping(self, flat_range: FlatRange) -> Iterator[Region]:
        """The regions that may have elements in a flat range."""
        first = bisect.bisect_right(self.max_stops, flat_range.start)
        last = bisect.bisect_left(self.starts, flat_range.stop)
        return itertools.islice(self.regions, first, last)


def _flat_span(region: Region, strides: Shape) -> tuple[int, int]:
    """The flat range [start, stop) from a region's first to its last element, in a tensor of those strides."""
    start = sum(start * stride for start, stride in zip(region.start, strides, strict=True))
    return start, start + 1 + sum((n - 1) * stride for n, stride in zip(region.sizes, strides, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FillTarget:
    """What a rank fills: a flat range of a tensor."""

    source_map: SourceMap
    flat_range: FlatRange


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadItem:
    """One range of a file and where its elements go.

    Of the `nbytes` bytes from `offset_bytes` of `file`, seen as elements of `dtype`, the one at
    `sum(i[d] * source_strides[d])` goes to element `start + sum(i[d] * target_strides[d])` of the target's local part, for
    every index `i` below `sizes`.
    """

    file: str
    offset_bytes: int
    nbytes: int
    dtype: str
    target: str
    start: int
    sizes: Shape
    source_strides: Shape
    target_strides: Shape
    scales: ScaleRows | None = None

    @property
    def is_contiguous(self) -> bool:
        """True if the bytes are wanted as they are, one behind the other."""
        return self.source_strides == self.target_strides == (1,)

    def continues_in(self, after: "ReadItem") -> bool:
        """True if both are plain runs, and `after` begins where this one ends, in the file and in the target."""
        return (
            self.offset_bytes + self.nbytes == after.offset_bytes
            and (self.target, self.file, self.dtype) == (after.target, after.file, after.dtype)
            and self.start + self.sizes[0] == after.start
            and self.is_contiguous
            and after.is_contiguous
            and self.scales is None is after.scales
        )

    @property
    def total_nbytes(self) -> int:
        """Bytes that it reads, scales included."""
        return self.nbytes + (self.scales.nbytes if self.scales else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All reads of one rank, in file order."""

    reads: tuple[ReadItem, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank reads."""
        return sum(read.total_nbytes for read in self.reads)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpec:
    """A strided copy: elements of flat `source` to elements of a target's local part, over a box of `sizes`."""

    source: str
    source_start: int
    target_start: int
    sizes: Shape
    source_strides: Shape
    target_strides: Shape


def plan_reads(targets: Iterable[FillTarget], stored: Mapping[str, StoredTensor]) -> Plan:
    """Turn what a rank must fill into reads, sorted by file and offset."""
    reads: list[ReadItem] = []
    for target in targets:
        for piece in copy_specs(target):
            reads += _reads(piece, target.source_map.name, stored[piece.source])
    return Plan(reads=tuple(_joined(sorted(reads, key=lambda read: (read.file, read.offset_bytes, read.target)))))


def _joined(reads: Iterable[ReadItem]) -> Iterator[ReadItem]:
    """Sorted reads, those that go on where the one before ends, there and here, as one: a range may begin within a row."""
    last: ReadItem | None = None
    for read in reads:
        if last is None:
            last = read
        elif last.continues_in(read):
            last = dataclasses.replace(last, nbytes=last.nbytes + read.nbytes, sizes=(last.sizes[0] + read.sizes[0],))
        else:
            yield last
            last = read
    if last is not None:
        yield last


def check_cover(source_map: SourceMap, stored: Mapping[str, StoredTensor]) -> None:
    """The regions of a tensor, which are disjoint, must have as many elements as it: one left out would stay uninitialised.

    Raises:
        CheckpointError: regions that leave a gap, or go past the end of their source.
    """
    covered = sum(math.prod(region.sizes) for region in source_map.regions)
    if covered != math.prod(source_map.shape):
        raise CheckpointError(
            f"{source_map.name}: sources give {covered} elements, expected {math.prod(source_map.shape)}",
            code="plan.elements_missing",
        )
    for region in source_map.regions:
        last = region.offset + sum((n - 1) * stride for n, stride in zip(region.sizes, region.strides, strict=True))
        source = stored[region.source]
        held = source.nbytes // source.itemsize
        if last >= held:
            raise CheckpointError(
                f"{source_map.name}: reads element {last} of {source.name} in {source.file}, of {held}",
                code="plan.read_beyond_tensor",
            )


def copy_specs(target: FillTarget) -> Iterator[CopySpec]:
    """The strided copies that fill a target's span."""
    flat_range, shape = target.flat_range, target.source_map.shape
    if flat_range.start >= flat_range.stop:
        return
    strides = row_major(shape)
    boxes = list(_boxes(shape, flat_range.start, flat_range.stop))
    for region in target.source_map.overlapping(flat_range):
        for start, sizes in boxes:
            piece = _intersection(region, start, sizes, strides, flat_range.start)
            if piece is not None:
                yield piece


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """The flat range `[start, stop)` of a tensor as boxes (corner, sizes). (2, 3), [1, 5) → 1 × 2 at (0, 1) and at (1, 0)."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (row, skip), (last, rest) = divmod(start, inner), divmod(stop, inner)
    if skip or row == last:
        end = rest if row == last else inner
        yield from (((row, *corner), (1, *sizes)) for corner, sizes in _boxes(shape[1:], skip, end))
        row += 1
    if row < last:
        yield (row, *(0,) * (len(shape) - 1)), (last - row, *shape[1:])
    if rest and row <= last:
        yield from (((last, *corner), (1, *sizes)) for corner, sizes in _boxes(shape[1:], 0, rest))


def _intersection(region: Region, start: Shape, sizes: Shape, strides: Shape, span_start: int) -> CopySpec | None:
    """The part of a region inside a box of the target, as a copy with as few dimensions as it needs."""
    source_start, target_start = region.offset, -span_start
    dims: list[list[int]] = []  # size, source stride, target stride
    for d, stride in enumerate(strides):
        low = max(region.start[d], start[d])
        high = min(region.start[d] + region.sizes[d], start[d] + sizes[d])
        if low >= high:
            return None
        source_start += (low - region.start[d]) * region.strides[d]
        target_start += low * stride
        size, walk = high - low, region.strides[d]
        if size == 1:
            continue
        if dims and dims[-1][1] == size * walk and dims[-1][2] == size * stride:
            dims[-1] = [dims[-1][0] * size, walk, stride]
        else:
            dims.append([size, walk, stride])
    dims = dims or [[1, 1, 1]]
    return CopySpec(
        source=region.source,
        source_start=source_start,
        target_start=target_start,
        sizes=tuple(size for size, _, _ in dims),
        source_strides=tuple(walk for _, walk, _ in dims),
        target_strides=tuple(stride for _, _, stride in dims),
    )


def _reads(piece: CopySpec, target: str, source: StoredTensor) -> Iterator[ReadItem]:
    """The ranges of a file that deliver a piece: as few as there are without reading along more than small gaps.

    Dimensions are taken from the finest source stride on into one range as long as the gaps that this reads along are small;
    over the others the ranges repeat.
    """
    dims = sorted(zip(piece.source_strides, piece.sizes, piece.target_strides, strict=True))
    is_contiguous = piece.source_strides == piece.target_strides == (1,)
    limit = SCALED_BYTES if isinstance(source, ScaledTensor) else source.nbytes if is_contiguous else SCATTER_BYTES
    taken, reach = 0, 1  # dimensions in a range, elements of a range
    for stride, size, _ in dims:
        longer = reach + (size - 1) * stride
        if (stride - reach) * source.itemsize > GAP_BYTES or longer * source.itemsize > limit:
            break
        taken, reach = taken + 1, longer
    inner, outer = dims[:taken], dims[taken:]
    if outer and (outer[0][0] - reach) * source.itemsize <= GAP_BYTES:  # a dimension that fits in parts
        stride, size, step = outer[0]
        part = max(1, 1 + (limit // source.itemsize - reach) // stride)
        for first in range(0, size, part):
            count = min(part, size - first)
            shifted = [(stride, count, step), *outer[1:]]
            yield from _repeated(piece, target, source, inner + shifted[:1], shifted[1:], first * stride, first * step)
        return
    yield from _repeated(piece, target, source, inner, outer, 0, 0)


def _repeated(
    piece: CopySpec,
    target: str,
    source: StoredTensor,
    inner: list[tuple[int, int, int]],
    outer: list[tuple[int, int, int]],
    source_skip: int,
    target_skip: int,
) -> Iterator[ReadItem]:
    """One range over the `inner` dimensions for every index of the `outer` ones, each (source stride, size, target stride)."""
    if outer:
        stride, size, step = outer[-1]
        for i in range(size):
            skips = (source_skip + i * stride, target_skip + i * step)
            yield from _repeated(piece, target, source, inner, outer[:-1], *skips)
        return
    box = [each for each in reversed(inner) if each[1] > 1] or [(1, 1, 1)]
    reach = 1 + sum((size - 1) * stride for stride, size, _ in box)
    start = piece.source_start + source_skip
    yield ReadItem(
        file=source.file,
        offset_bytes=source.offset_bytes + start * source.itemsize,
        nbytes=reach * source.itemsize,
        dtype=source.dtype,
        target=target,
        start=piece.target_start + target_skip,
        sizes=tuple(size for _, size, _ in box),
        source_strides=tuple(stride for stride, _, _ in box),
        target_strides=tuple(step for _, _, step in box),
        scales=source.scale_rows(start, reach) if isinstance(source, ScaledTensor) else None,
    )
