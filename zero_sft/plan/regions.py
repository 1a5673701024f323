"""Where the elements of a tensor come from: boxes of it, each a strided walk through one source.

A tensor that was made from others by moving elements about (stacking, splitting, transposing, reshaping) is a shape and a
tuple of regions. The box `[start, start + sizes)` of the tensor holds the elements `offset + sum(i[d] * strides[d])` of the
flat `source`, `i` counted from the box's corner. Every function here gives the regions of the result of one such operation,
exactly; boxes never overlap, and what the inputs cover the result covers.

Worked example: a source of 6 elements as a (2, 3) matrix, transposed: shape (3, 2), one region, start (0, 0), sizes (3, 2),
strides (1, 3). Read row by row that is 0 3 1 4 2 5. Flattened, the walk has no single stride any more: three regions of two
elements each, offsets 0, 1, 2, stride 3.

Pure, standard library only. Left out: anything that computes with elements.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

MAX_REGIONS = 1 << 18
"""A tensor in more pieces than this is not worth a plan: a rank would spend its time on bookkeeping."""


class TooManyRegions(ValueError):
    """The tensor falls into more than `MAX_REGIONS` pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The box `[start, start + sizes)` of a tensor, and the walk through flat `source` that fills it, in elements."""

    start: Shape
    sizes: Shape
    source: str
    offset: int
    strides: Shape


Regions = tuple[Region, ...]


def row_major(shape: Sequence[int]) -> Shape:
    """Strides, in elements, of a contiguous tensor. Worked example: (2, 3, 4) → (12, 4, 1)."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def identity_regions(source: str, shape: Shape, *, offset: int = 0, strides: Shape | None = None) -> Regions:
    """The regions of a source itself, seen as a tensor of `shape`."""
    if 0 in shape:
        return ()
    walk = row_major(shape) if strides is None else strides
    return (Region(start=(0,) * len(shape), sizes=shape, source=source, offset=offset, strides=walk),)


def concatenate(parts: Iterable[tuple[Shape, Regions]], dim: int) -> Regions:
    """Tensors one behind the other along `dim`."""
    result: list[Region] = []
    position = 0
    for shape, regions in parts:
        result += [replace(each, start=_set(each.start, dim, each.start[dim] + position)) for each in regions]
        position += shape[dim]
    return _checked(result)


def narrow(regions: Regions, dim: int, start: int, stop: int, step: int = 1) -> Regions:
    """The indices `start, start + step, ... < stop` of dimension `dim`; they become `0, 1, ...`."""
    result = []
    for each in regions:
        low, size, stride = each.start[dim], each.sizes[dim], each.strides[dim]
        first = max(start, low + (start - low) % step if low > start else start)  # the first index in the box and on the grid
        last = min(stop, low + size)
        if first >= last:
            continue
        count = -(-(last - first) // step)
        result.append(
            replace(
                each,
                start=_set(each.start, dim, (first - start) // step),
                sizes=_set(each.sizes, dim, count),
                offset=each.offset + (first - low) * stride,
                strides=_set(each.strides, dim, stride * step),
            )
        )
    return tuple(result)


def drop_dim(regions: Regions, dim: int) -> Regions:
    """Without dimension `dim`, whose size is 1."""
    return tuple(
        replace(each, start=_cut(each.start, dim), sizes=_cut(each.sizes, dim), strides=_cut(each.strides, dim))
        for each in regions
    )


def add_dim(regions: Regions, dim: int) -> Regions:
    """With a new dimension of size 1 in front of the present dimension `dim`."""
    return tuple(
        replace(
            each,
            start=_insert(each.start, dim, 0),
            sizes=_insert(each.sizes, dim, 1),
            strides=_insert(each.strides, dim, 0),
        )
        for each in regions
    )


def permute(regions: Regions, order: Sequence[int]) -> Regions:
    """Dimension `d` of the result is dimension `order[d]` of the tensor."""
    return tuple(
        replace(
            each,
            start=tuple(each.start[d] for d in order),
            sizes=tuple(each.sizes[d] for d in order),
            strides=tuple(each.strides[d] for d in order),
        )
        for each in regions
    )


def expand(regions: Regions, shape: Shape, new_shape: Shape) -> Regions:
    """Dimensions of size 1 repeated to `new_shape`, which has as many dimensions."""
    repeated = [d for d in range(len(shape)) if shape[d] == 1 != new_shape[d]]
    result = []
    for region in regions:
        each = region
        for d in repeated:
            each = replace(each, sizes=_set(each.sizes, d, new_shape[d]), strides=_set(each.strides, d, 0))
        result.append(each)
    return tuple(result)


def reshape(regions: Regions, shape: Shape, new_shape: Shape) -> Regions:
    """The same elements in row-major order under another shape.

    Dimensions of both shapes are matched from the left in groups of equal size; within a group the old dimensions are merged
    to one, and that one is split into the new. Worked example: (4, 6) → (2, 2, 6) are the groups 4 → 2, 2 and 6 → 6.
    """
    if 0 in shape:
        return ()
    for dim in [d for d in reversed(range(len(shape))) if shape[d] == 1]:
        regions = drop_dim(regions, dim)
    old = tuple(size for size in shape if size != 1)
    new = tuple(size for size in new_shape if size != 1)
    dim = 0
    for olds, news in _groups(old, new):
        if olds != news:
            for _ in olds[1:]:
                regions = _merge(regions, dim, old[dim + 1])
                old = (*old[:dim], old[dim] * old[dim + 1], *old[dim + 2 :])
            for size in reversed(news[1:]):
                regions = _split(regions, dim, size)
                old = (*old[:dim], old[dim] // size, size, *old[dim + 1 :])
        dim += len(news)
    for dim in [d for d in range(len(new_shape)) if new_shape[d] == 1]:
        regions = add_dim(regions, dim)
    return _checked(regions)


def _groups(old: Shape, new: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Dimensions, none of size 1, in the smallest groups of equal products. (4, 6, 5), (2, 12, 5) → 4, 6 | 2, 12 and 5 | 5."""
    i = j = 0
    while i < len(old):
        first_i, first_j = i, j
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= old[i]
                i += 1
            else:
                right *= new[j]
                j += 1
        yield old[first_i:i], new[first_j:j]


def _merge(regions: Regions, dim: int, inner: int) -> Regions:
    """Dimensions `dim` and `dim + 1`, the latter of size `inner`, as one.

    A box whose rows are whole and follow each other in the source stays one box; any other falls into its rows.
    """
    result = []
    for each in regions:
        (low, start), (rows, size) = each.start[dim : dim + 2], each.sizes[dim : dim + 2]
        (row_stride, stride) = each.strides[dim : dim + 2]
        if rows == 1 or (size == inner and row_stride == stride * inner):
            result.append(_with(each, dim, 2, [(low * inner + start, rows * size, stride)], 0))
            continue
        result += [_with(each, dim, 2, [((low + row) * inner + start, size, stride)], row * row_stride) for row in range(rows)]
        _checked(result)
    return tuple(result)


def _split(regions: Regions, dim: int, inner: int) -> Regions:
    """Dimension `dim` as two, the latter of size `inner`: the end of a first row, whole rows, the beginning of a last one."""
    result = []
    for each in regions:
        low, stop, stride = each.start[dim], each.start[dim] + each.sizes[dim], each.strides[dim]
        first, last = -(-low // inner), stop // inner  # whole rows
        cuts = [(low, min(stop, first * inner))] if low % inner else []
        if first < last:
            cuts.append((first * inner, last * inner))
        if stop % inner and last * inner >= low:
            cuts.append((last * inner, stop))
        for begin, end in cuts:
            rows = max(1, (end - begin) // inner)
            box = [(begin // inner, rows, stride * inner), (begin % inner, (end - begin) // rows, stride)]
            result.append(_with(each, dim, 1, box, (begin - low) * stride))
    return _checked(result)


def _with(region: Region, dim: int, count: int, box: Sequence[tuple[int, int, int]], skip: int) -> Region:
    """`region` with `count` dimensions from `dim` on replaced by those of `box`, (start, size, stride) each."""
    starts, sizes, strides = zip(*box, strict=True)
    return replace(
        region,
        start=(*region.start[:dim], *starts, *region.start[dim + count :]),
        sizes=(*region.sizes[:dim], *sizes, *region.sizes[dim + count :]),
        strides=(*region.strides[:dim], *strides, *region.strides[dim + count :]),
        offset=region.offset + skip,
    )


def _checked(regions: Iterable[Region]) -> Regions:
    result = tuple(regions)
    if len(result) > MAX_REGIONS:
        raise TooManyRegions(f"more than {MAX_REGIONS} pieces")
    return result


def _set(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])


def _cut(values: Shape, dim: int) -> Shape:
    return (*values[:dim], *values[dim + 1 :])


def _insert(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim:])
