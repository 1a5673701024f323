"""The plan of one rank: the targets to fill × the stored tensors → reads.

A target is a flat range of a tensor that the rank must fill: its shard, or all of it. The tensor's `SourceMap`, the same on
every rank, maps regions of it to stored elements. The planner clips the regions to the target's flat range and turns them into
reads. Each read is one range of a file whose elements are copied to their positions in the target.
Nothing here reads, allocates or communicates, so the plan of any rank of any world can be computed in one process.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
class ReadItem:
    """One range of a file, and the positions of its elements in a target.

    The read covers `nbytes` bytes at `offset_bytes` of `file`, seen as elements of `dtype`. For every index `i` below `sizes`,
    its element `sum(i[d] * source_strides[d])` goes to element `target_start + sum(i[d] * target_strides[d])` of the target's
    local part.
    """

    file: str
    offset_bytes: int
    nbytes: int
    dtype: str
    target: str
    target_start: int
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
            and self.target_start + self.sizes[0] == after.target_start
            and self.is_contiguous
            and after.is_contiguous
            and self.scales is None is after.scales
        )

    @property
    def total_nbytes(self) -> int:
        """Bytes to read, scales included."""
        return self.nbytes + (self.scales.nbytes if self.scales else 0)


class CopyDim(NamedTuple):
    """One dimension of a strided copy: the steps between its elements in source and target, in elements, and their number."""

    source_stride: int
    size: int
    target_stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpec:
    """A strided copy from the flat `source` to a target's local part. All values are in elements."""

    source: str
    source_start: int
    target_start: int
    dims: tuple[CopyDim, ...]


def plan_reads(targets: Iterable[tuple[SourceMap, FlatRange]], stored: Mapping[str, StoredTensor]) -> tuple[ReadItem, ...]:
    """Plan the reads that fill a rank's targets, sorted by file and offset."""
    reads: list[ReadItem] = []
    for source_map, flat_range in targets:
        for spec in copy_specs(source_map, flat_range):
            reads += _reads(spec, source_map.name, stored[spec.source])
    return _merged(sorted(reads, key=lambda read: (read.file, read.offset_bytes, read.target)))


def _merged(reads: Iterable[ReadItem]) -> tuple[ReadItem, ...]:
    """Merge sorted reads that are contiguous both in the file and in the target.

    Such reads occur where a flat range begins within a row.
    """
    merged: list[ReadItem] = []
    for read in reads:
        if merged and merged[-1].continues_in(read):
            last = merged[-1]
            merged[-1] = dataclasses.replace(last, nbytes=last.nbytes + read.nbytes, sizes=(last.sizes[0] + read.sizes[0],))
        else:
            merged.append(read)
    return tuple(merged)


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


def copy_specs(source_map: SourceMap, flat_range: FlatRange) -> Iterator[CopySpec]:
    """Iterate over the strided copies that fill a flat range of a tensor."""
    strides = row_major(source_map.shape)
    boxes = list(_boxes(source_map.shape, flat_range.start, flat_range.stop))
    for region in source_map.overlapping(flat_range):
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
    dims: list[CopyDim] = []
    for d, target_stride in enumerate(strides):
        low = max(region.start[d], start[d])
        high = min(region.start[d] + region.sizes[d], start[d] + sizes[d])
        if low >= high:
            return None
        size, source_stride = high - low, region.strides[d]
        source_start += (low - region.start[d]) * source_stride
        target_start += low * target_stride
        if size == 1:
            continue
        if dims and dims[-1].source_stride == size * source_stride and dims[-1].target_stride == size * target_stride:
            size *= dims.pop().size
        dims.append(CopyDim(source_stride, size, target_stride))
    dims = dims or [CopyDim(1, 1, 1)]
    return CopySpec(source=region.source, source_start=source_start, target_start=target_start, dims=tuple(dims))


def _reads(spec: CopySpec, target: str, source: StoredTensor) -> Iterator[ReadItem]:
    """Iterate over the reads that carry out a copy: as few as possible without reading more than small gaps."""
    is_contiguous = len(spec.dims) == 1 and spec.dims[0].source_stride == spec.dims[0].target_stride == 1
    limit = SCALED_BYTES if isinstance(source, ScaledTensor) else source.nbytes if is_contiguous else SCATTER_BYTES
    finest_first = sorted(spec.dims, key=lambda dim: dim.source_stride)
    inner, outer, part_size = _split_dims(finest_first, GAP_BYTES // source.itemsize, limit // source.itemsize)
    # One read covers the dimensions `inner`, and a part of the first one of `outer`.
    starts = [range(0, dim.size, part_size if position == 0 else 1) for position, dim in enumerate(outer)]
    for index in itertools.product(*starts):
        box = inner[::-1]
        if outer:
            stride, size, target_stride = outer[0]
            box.insert(0, CopyDim(stride, min(part_size, size - index[0]), target_stride))
        box = [dim for dim in box if dim.size > 1] or [CopyDim(1, 1, 1)]
        start = spec.source_start + sum(i * dim.source_stride for i, dim in zip(index, outer, strict=True))
        length = 1 + sum((dim.size - 1) * dim.source_stride for dim in box)
        yield ReadItem(
            file=source.file,
            offset_bytes=source.offset_bytes + start * source.itemsize,
            nbytes=length * source.itemsize,
            dtype=source.dtype,
            target=target,
            target_start=spec.target_start + sum(i * dim.target_stride for i, dim in zip(index, outer, strict=True)),
            sizes=tuple(dim.size for dim in box),
            source_strides=tuple(dim.source_stride for dim in box),
            target_strides=tuple(dim.target_stride for dim in box),
            scales=source.scale_rows(start, length) if isinstance(source, ScaledTensor) else None,
        )


def _split_dims(dims: list[CopyDim], gap: int, limit: int) -> tuple[list[CopyDim], list[CopyDim], int]:
    """Split the dimensions of a copy, finest source stride first, into those within one read and those over which it repeats.

    A read includes dimensions as long as their gaps have at most `gap` elements and the read at most `limit`. Of the next one
    it includes as many elements as fit: the third value, which is 1 if the gaps are too large.
    """
    length = 1  # elements from the first to the last one of a read
    for count, dim in enumerate(dims):
        if dim.source_stride - length > gap:
            return dims[:count], dims[count:], 1
        if length + (dim.size - 1) * dim.source_stride > limit:
            return dims[:count], dims[count:], max(1, 1 + (limit - length) // dim.source_stride)
        length += (dim.size - 1) * dim.source_stride
    return dims, [], 1
