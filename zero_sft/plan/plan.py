"""The plan of one rank: the targets to fill × the stored tensors → reads.

A target is a shard or a whole tensor that the rank must fill. Its `SourceMap`, the same on every rank, maps regions of the
tensor to stored elements. The planner clips the regions to the target's flat range and turns them into reads. Each read is one
range of a file whose elements are copied to their positions in the target.
Nothing here reads, allocates or communicates, so the plan of any rank of any world can be computed in one process.
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
"""The largest gap between needed bytes that a read includes: one page, which the file system reads anyway."""

SCATTER_BYTES = 8 * 2**20
"""The longest read, in bytes, whose elements are scattered in memory."""

SCALED_BYTES = 2**20
"""The longest read, in bytes, whose elements are multiplied by scales, which takes about 16 bytes of memory per element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMap:
    """The mapping of the tensor `name` to stored elements: disjoint regions, sorted by their first flat element.

    The order lets `overlapping` find the regions of a flat range by bisection.

    Attributes:
        starts: the first flat element of each region, ascending.
        max_stops: for each region, one past the last flat element of all regions up to this one.
    """

    name: str
    shape: Shape
    regions: Regions
    starts: tuple[int, ...]
    max_stops: tuple[int, ...]

    @classmethod
    def of(cls, name: str, shape: Shape, regions: Regions) -> "SourceMap":
        """Build the map of a tensor from its regions in any order."""
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
        """Iterate over the regions that may have elements in a flat range."""
        first = bisect.bisect_right(self.max_stops, flat_range.start)
        last = bisect.bisect_left(self.starts, flat_range.stop)
        return itertools.islice(self.regions, first, last)


def _flat_span(region: Region, strides: Shape) -> tuple[int, int]:
    """Return the flat range [start, stop) from a region's first to its last element, in a tensor with these strides."""
    start = sum(index * stride for index, stride in zip(region.start, strides, strict=True))
    return start, start + 1 + sum((size - 1) * stride for size, stride in zip(region.sizes, strides, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FillTarget:
    """A flat range of a tensor, which a rank must fill."""

    source_map: SourceMap
    flat_range: FlatRange


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadItem:
    """One range of a file, and the positions of its elements in a target.

    The read covers `nbytes` bytes at `offset_bytes` of `file`, seen as elements of `dtype`. For every index `i` below `sizes`,
    its element `sum(i[d] * source_strides[d])` goes to element `start + sum(i[d] * target_strides[d])` of the target's local
    part.
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
        """True if the elements are consecutive in the file and in the target."""
        return self.source_strides == self.target_strides == (1,)

    def continues_in(self, after: "ReadItem") -> bool:
        """True if both reads are contiguous, and `after` begins where this one ends in the file and in the target."""
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
        """Bytes to read, scales included."""
        return self.nbytes + (self.scales.nbytes if self.scales else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All reads of one rank, in file order."""

    reads: tuple[ReadItem, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the rank reads."""
        return sum(read.total_nbytes for read in self.reads)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpec:
    """A strided copy over a box of `sizes`, from the flat `source` to a target's local part. All values are in elements."""

    source: str
    source_start: int
    target_start: int
    sizes: Shape
    source_strides: Shape
    target_strides: Shape


def plan_reads(targets: Iterable[FillTarget], stored: Mapping[str, StoredTensor]) -> Plan:
    """Plan the reads that fill a rank's targets, sorted by file and offset."""
    reads: list[ReadItem] = []
    for target in targets:
        for spec in copy_specs(target):
            reads += _reads(spec, target.source_map.name, stored[spec.source])
    return Plan(reads=tuple(_merged(sorted(reads, key=lambda read: (read.file, read.offset_bytes, read.target)))))


def _merged(reads: Iterable[ReadItem]) -> Iterator[ReadItem]:
    """Merge sorted reads that are contiguous both in the file and in the target.

    Such reads occur where a flat range begins within a row.
    """
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
    """Check that the regions of a tensor, which are disjoint, cover it: an element left out would stay uninitialised.

    Raises:
        CheckpointError: the regions leave a gap, or read past the end of a stored tensor.
    """
    covered = sum(math.prod(region.sizes) for region in source_map.regions)
    if covered != math.prod(source_map.shape):
        raise CheckpointError(
            f"{source_map.name}: the checkpoint provides {covered} elements, expected {math.prod(source_map.shape)}",
            code="plan.elements_missing",
        )
    for region in source_map.regions:
        last = region.offset + sum((size - 1) * stride for size, stride in zip(region.sizes, region.strides, strict=True))
        source = stored[region.source]
        stored_numel = source.nbytes // source.itemsize
        if last >= stored_numel:
            raise CheckpointError(
                f"{source_map.name}: needs element {last} of {source.name}, but {source.file} stores {stored_numel} of them",
                code="plan.read_beyond_tensor",
            )


def copy_specs(target: FillTarget) -> Iterator[CopySpec]:
    """Iterate over the strided copies that fill a target."""
    flat_range, shape = target.flat_range, target.source_map.shape
    if flat_range.start >= flat_range.stop:
        return
    strides = row_major(shape)
    boxes = list(_boxes(shape, flat_range.start, flat_range.stop))
    for region in target.source_map.overlapping(flat_range):
        for start, sizes in boxes:
            spec = _intersection(region, start, sizes, strides, flat_range.start)
            if spec is not None:
                yield spec


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Split the flat range `[start, stop)` of a tensor into boxes (corner, sizes).

    Worked example: [1, 5) of shape (2, 3) → boxes of 1 × 2 at (0, 1) and at (1, 0).
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (row, skip), (last_row, rest) = divmod(start, inner), divmod(stop, inner)
    if skip or row == last_row:
        end = rest if row == last_row else inner
        yield from (((row, *corner), (1, *sizes)) for corner, sizes in _boxes(shape[1:], skip, end))
        row += 1
    if row < last_row:
        yield (row, *(0,) * (len(shape) - 1)), (last_row - row, *shape[1:])
    if rest and row <= last_row:
        yield from (((last_row, *corner), (1, *sizes)) for corner, sizes in _boxes(shape[1:], 0, rest))


def _intersection(region: Region, start: Shape, sizes: Shape, strides: Shape, flat_start: int) -> CopySpec | None:
    """Return the part of a region inside a box of the target, as a copy with as few dimensions as possible."""
    source_start, target_start = region.offset, -flat_start
    dims: list[list[int]] = []  # [size, source stride, target stride]
    for d, stride in enumerate(strides):
        low = max(region.start[d], start[d])
        high = min(region.start[d] + region.sizes[d], start[d] + sizes[d])
        if low >= high:
            return None
        source_start += (low - region.start[d]) * region.strides[d]
        target_start += low * stride
        size, source_stride = high - low, region.strides[d]
        if size == 1:
            continue
        if dims and dims[-1][1] == size * source_stride and dims[-1][2] == size * stride:
            dims[-1] = [dims[-1][0] * size, source_stride, stride]
        else:
            dims.append([size, source_stride, stride])
    dims = dims or [[1, 1, 1]]
    return CopySpec(
        source=region.source,
        source_start=source_start,
        target_start=target_start,
        sizes=tuple(size for size, _, _ in dims),
        source_strides=tuple(source_stride for _, source_stride, _ in dims),
        target_strides=tuple(target_stride for _, _, target_stride in dims),
    )


def _reads(spec: CopySpec, target: str, source: StoredTensor) -> Iterator[ReadItem]:
    """Iterate over the reads that carry out a copy: as few as possible without reading more than small gaps.

    A read includes dimensions from the finest source stride upwards, as long as their gaps are small and the read stays within
    the limit. It is repeated for every index of the remaining dimensions.
    """
    dims = sorted(zip(spec.source_strides, spec.sizes, spec.target_strides, strict=True))
    is_contiguous = spec.source_strides == spec.target_strides == (1,)
    limit = SCALED_BYTES if isinstance(source, ScaledTensor) else source.nbytes if is_contiguous else SCATTER_BYTES
    included, length = 0, 1  # dimensions in a read, elements from its first to its last
    for stride, size, _ in dims:
        longer = length + (size - 1) * stride
        if (stride - length) * source.itemsize > GAP_BYTES or longer * source.itemsize > limit:
            break
        included, length = included + 1, longer
    inner, outer = dims[:included], dims[included:]
    if outer and (outer[0][0] - length) * source.itemsize <= GAP_BYTES:  # the gaps are small, but the dimension is too long
        stride, size, target_stride = outer[0]
        part_size = max(1, 1 + (limit // source.itemsize - length) // stride)
        for first in range(0, size, part_size):
            part = (stride, min(part_size, size - first), target_stride)
            yield from _repeated(spec, target, source, [*inner, part], outer[1:], first * stride, first * target_stride)
        return
    yield from _repeated(spec, target, source, inner, outer, 0, 0)


def _repeated(
    spec: CopySpec,
    target: str,
    source: StoredTensor,
    inner: list[tuple[int, int, int]],
    outer: list[tuple[int, int, int]],
    source_skip: int,
    target_skip: int,
) -> Iterator[ReadItem]:
    """Iterate over the reads, one for every index of the `outer` dimensions. Each covers the `inner` dimensions.

    A dimension is a tuple (source stride, size, target stride).
    """
    if outer:
        stride, size, target_stride = outer[-1]
        for i in range(size):
            skips = (source_skip + i * stride, target_skip + i * target_stride)
            yield from _repeated(spec, target, source, inner, outer[:-1], *skips)
        return
    box = [dim for dim in reversed(inner) if dim[1] > 1] or [(1, 1, 1)]
    length = 1 + sum((size - 1) * stride for stride, size, _ in box)
    start = spec.source_start + source_skip
    yield ReadItem(
        file=source.file,
        offset_bytes=source.offset_bytes + start * source.itemsize,
        nbytes=length * source.itemsize,
        dtype=source.dtype,
        target=target,
        start=spec.target_start + target_skip,
        sizes=tuple(size for _, size, _ in box),
        source_strides=tuple(stride for stride, _, _ in box),
        target_strides=tuple(target_stride for _, _, target_stride in box),
        scales=source.scale_rows(start, length) if isinstance(source, ScaledTensor) else None,
    )
