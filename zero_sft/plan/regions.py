"""The provenance of a tensor's elements: boxes of the tensor, each filled by a strided view of one source.

A tensor that is made from others by moving elements (stack, split, transpose, reshape) is described by a shape and a tuple of
regions. A region's box `[start, start + sizes)` holds elements `offset + sum(i[d] * strides[d])` of the flat `source`, where
`i` counts from the box's corner. Each function here returns the exact regions of the result of one operation. Boxes never
overlap, and regions that cover the inputs give regions that cover the result.

Worked example: a source of 6 elements is seen as a (2, 3) matrix and transposed. The result has shape (3, 2) and one region:
start (0, 0), sizes (3, 2), strides (1, 3). In row-major order its elements are 0 3 1 4 2 5. Flattened, it has no single stride
any more: it has three regions of two elements each, with offsets 0, 1, 2 and stride 3.

Pure, standard library only. Left out: every operation that computes with elements.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

MAX_REGIONS = 1 << 18
"""A tensor with more regions is not planned, because the bookkeeping would dominate the load."""


class TooManyRegions(ValueError):
    """The tensor has more than `MAX_REGIONS` regions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The box `[start, start + sizes)` of a tensor, and the strided view of the flat `source` that fills it. In elements."""

    start: Shape
    sizes: Shape
    source: str
    offset: int
    strides: Shape


Regions = tuple[Region, ...]


def row_major(shape: Sequence[int]) -> Shape:
    """Return the strides, in elements, of a contiguous tensor. Worked example: (2, 3, 4) → (12, 4, 1)."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def identity_regions(source: str, shape: Shape, *, offset: int = 0, strides: Shape | None = None) -> Regions:
    """Return the regions of a source that is seen as a tensor of `shape`; row-major if `strides` is None."""
    if 0 in shape:
        return ()
    strides = row_major(shape) if strides is None else strides
    return (Region(start=(0,) * len(shape), sizes=shape, source=source, offset=offset, strides=strides),)


def concatenate(parts: Iterable[tuple[Shape, Regions]], dim: int) -> Regions:
    """Concatenate tensors along `dim`."""
    result: list[Region] = []
    position = 0
    for shape, regions in parts:
        for region in regions:
            start, size, stride = _dim_of(region, dim)
            result.append(_replace_dims(region, dim, 1, [(position + start, size, stride)]))
        position += shape[dim]
    return _checked(result)


def narrow(regions: Regions, dim: int, start: int, stop: int, step: int = 1) -> Regions:
    """Select the indices `start, start + step, ... < stop` of dimension `dim`; they become `0, 1, ...`."""
    result: list[Region] = []
    for region in regions:
        low, size, stride = _dim_of(region, dim)
        first = max(start, low + (start - low) % step if low > start else start)  # the first selected index in the box
        last = min(stop, low + size)
        if first < last:
            box = ((first - start) // step, -(-(last - first) // step), stride * step)
            result.append(_replace_dims(region, dim, 1, [box], (first - low) * stride))
    return tuple(result)


def drop_dim(regions: Regions, dim: int) -> Regions:
    """Remove dimension `dim`, whose size is 1."""
    return tuple(_replace_dims(region, dim, 1, []) for region in regions)


def add_dim(regions: Regions, dim: int) -> Regions:
    """Insert a dimension of size 1 at position `dim`."""
    return tuple(_replace_dims(region, dim, 0, [(0, 1, 0)]) for region in regions)


def permute(regions: Regions, order: Sequence[int]) -> Regions:
    """Permute dimensions: dimension `d` of the result is dimension `order[d]` of the tensor."""
    return tuple(
        replace(
            region,
            start=tuple(region.start[d] for d in order),
            sizes=tuple(region.sizes[d] for d in order),
            strides=tuple(region.strides[d] for d in order),
        )
        for region in regions
    )


def expand(regions: Regions, shape: Shape, new_shape: Shape) -> Regions:
    """Expand dimensions of size 1 to `new_shape`, which has the same number of dimensions."""
    for dim in [d for d in range(len(shape)) if shape[d] == 1 != new_shape[d]]:
        regions = tuple(_replace_dims(region, dim, 1, [(0, new_shape[dim], 0)]) for region in regions)
    return regions


def reshape(regions: Regions, shape: Shape, new_shape: Shape) -> Regions:
    """Give the tensor another shape, with the same elements in row-major order.

    The dimensions of both shapes are matched from the left in groups of equal size. In each group the old dimensions are merged
    into one, which is then split into the new ones. Worked example: (4, 6) → (2, 2, 6) has the groups 4 → 2, 2 and 6 → 6.
    """
    if 0 in shape:
        return ()
    for dim in [d for d in reversed(range(len(shape))) if shape[d] == 1]:
        regions = drop_dim(regions, dim)
    old: Shape = tuple(size for size in shape if size != 1)
    new: Shape = tuple(size for size in new_shape if size != 1)
    dim = 0
    for old_group, new_group in _groups(old, new):
        if old_group != new_group:
            for _ in old_group[1:]:
                regions = _merge(regions, dim, old[dim + 1])
                old = (*old[:dim], old[dim] * old[dim + 1], *old[dim + 2 :])
            for size in reversed(new_group[1:]):
                regions = _split(regions, dim, size)
                old = (*old[:dim], old[dim] // size, size, *old[dim + 1 :])
        dim += len(new_group)
    for dim in [d for d in range(len(new_shape)) if new_shape[d] == 1]:
        regions = add_dim(regions, dim)
    return _checked(regions)


def _groups(old: Shape, new: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Match the dimensions of two shapes, without size 1, in the smallest groups of equal products.

    Worked example: (4, 6, 5) and (2, 12, 5) → (4, 6) with (2, 12), and (5,) with (5,).
    """
    i = j = 0
    while i < len(old):
        first_i, first_j = i, j
        old_numel, new_numel = old[i], new[j]
        i, j = i + 1, j + 1
        while old_numel != new_numel:
            if old_numel < new_numel:
                old_numel *= old[i]
                i += 1
            else:
                new_numel *= new[j]
                j += 1
        yield old[first_i:i], new[first_j:j]


def _merge(regions: Regions, dim: int, inner: int) -> Regions:
    """Merge dimensions `dim` and `dim + 1`; the latter has size `inner`.

    A box stays one box if its rows are complete and consecutive in the source. Otherwise each row becomes a box.
    """
    result: list[Region] = []
    for region in regions:
        (low, rows, row_stride), (start, size, stride) = _dim_of(region, dim), _dim_of(region, dim + 1)
        if rows == 1 or (size == inner and row_stride == stride * inner):
            result.append(_replace_dims(region, dim, 2, [(low * inner + start, rows * size, stride)]))
            continue
        for row in range(rows):
            result.append(_replace_dims(region, dim, 2, [((low + row) * inner + start, size, stride)], row * row_stride))
        _checked(result)
    return tuple(result)


def _split(regions: Regions, dim: int, inner: int) -> Regions:
    """Split dimension `dim` into two; the latter has size `inner`.

    A box becomes up to three: the end of its first row, its complete rows, and the beginning of its last row.
    """
    result: list[Region] = []
    for region in regions:
        low, size, stride = _dim_of(region, dim)
        stop = low + size
        first_row, stop_row = -(-low // inner), stop // inner  # complete rows
        parts = [(low, min(stop, first_row * inner))] if low % inner else []
        if first_row < stop_row:
            parts.append((first_row * inner, stop_row * inner))
        if stop % inner and stop_row * inner >= low:
            parts.append((stop_row * inner, stop))
        for begin, end in parts:
            rows = max(1, (end - begin) // inner)
            box = [(begin // inner, rows, stride * inner), (begin % inner, (end - begin) // rows, stride)]
            result.append(_replace_dims(region, dim, 1, box, (begin - low) * stride))
    return _checked(result)


def _dim_of(region: Region, dim: int) -> tuple[int, int, int]:
    """Return start, size and stride of one dimension."""
    return region.start[dim], region.sizes[dim], region.strides[dim]


def _replace_dims(region: Region, dim: int, count: int, box: Sequence[tuple[int, int, int]], skip: int = 0) -> Region:
    """Replace `count` dimensions from `dim` on by `box`, tuples (start, size, stride). `skip` moves the offset."""
    return replace(
        region,
        start=(*region.start[:dim], *(start for start, _, _ in box), *region.start[dim + count :]),
        sizes=(*region.sizes[:dim], *(size for _, size, _ in box), *region.sizes[dim + count :]),
        strides=(*region.strides[:dim], *(stride for _, _, stride in box), *region.strides[dim + count :]),
        offset=region.offset + skip,
    )


def _checked(regions: Iterable[Region]) -> Regions:
    result = tuple(regions)
    if len(result) > MAX_REGIONS:
        raise TooManyRegions(f"more than {MAX_REGIONS} regions")
    return result
