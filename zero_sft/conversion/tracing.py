"""Tensors that carry provenance instead of data, so that transformers' conversion operations can be traced unchanged.

A `TracedTensor` has a shape, a dtype, and `regions` that map each of its elements to a stored element. Operations that only
move elements have an exact rule below. All others raise `NotTraceable`, so that nothing is traced wrongly. Composite
operations (reshape, chunk, flatten, movedim, ...) arrive here as the few basic ones into which torch decomposes them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zero_sft.plan import regions
from zero_sft.plan.regions import Regions, Shape

aten = torch.ops.aten


class NotTraceable(RuntimeError):
    """The operation computes with values, or has no tracing rule."""


class TracedTensor(torch.Tensor):
    """A tensor without data whose elements are described by their storage locations."""

    regions: Regions

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: Regions) -> "TracedTensor":
        """Create a contiguous tensor of `shape` that consists of the regions `parts`."""
        traced = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))
        traced.regions = parts
        return traced

    def __init__(self, *_: Any) -> None:
        """Do nothing: `__new__` sets everything."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TracedTensor({tuple(self.shape)}, {self.dtype}, {len(self.regions)} regions)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            raise NotTraceable(f"{func} computes with elements, or has no tracing rule")
        return rule(*args, **(kwargs or {}))


def trace_stored(name: str, shape: Shape, dtype: torch.dtype, strides: Shape | None = None) -> TracedTensor:
    """Trace the stored tensor `name`, which is row-major if `strides` is None."""
    return TracedTensor(shape, dtype, regions.identity_regions(name, shape, strides=strides))


def _dim(tensor: torch.Tensor, dim: int, extra: int = 0) -> int:
    return dim % (tensor.dim() + extra) if tensor.dim() + extra else 0


def _reshape(tensor: TracedTensor, shape: Sequence[int], **_: Any) -> TracedTensor:
    sizes = list(shape)
    if -1 in sizes:
        other_numel = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = tensor.numel() // other_numel if other_numel else 0
    new_shape = tuple(sizes)
    return TracedTensor(new_shape, tensor.dtype, regions.reshape(tensor.regions, tuple(tensor.shape), new_shape))


def _permute(tensor: TracedTensor, order: Sequence[int]) -> TracedTensor:
    order = [_dim(tensor, dim) for dim in order]
    return TracedTensor([tensor.shape[d] for d in order], tensor.dtype, regions.permute(tensor.regions, order))


def _transpose(tensor: TracedTensor, dim0: int = 0, dim1: int = 1) -> TracedTensor:
    order = list(range(tensor.dim()))
    if order:
        dim0, dim1 = _dim(tensor, dim0), _dim(tensor, dim1)
        order[dim0], order[dim1] = dim1, dim0
    return _permute(tensor, order)


def _slice(
    tensor: TracedTensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> TracedTensor:
    dim = _dim(tensor, dim)
    indices = range(tensor.shape[dim])[slice(start, stop, step)]
    shape = [*tensor.shape[:dim], len(indices), *tensor.shape[dim + 1 :]]
    return TracedTensor(shape, tensor.dtype, regions.narrow(tensor.regions, dim, indices.start, indices.stop, step))


def _select(tensor: TracedTensor, dim: int, index: int) -> TracedTensor:
    dim, index = _dim(tensor, dim), int(index) % tensor.shape[dim]
    slab = regions.narrow(tensor.regions, dim, index, index + 1)
    return TracedTensor([*tensor.shape[:dim], *tensor.shape[dim + 1 :]], tensor.dtype, regions.drop_dim(slab, dim))


def _unbind(tensor: TracedTensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[_dim(tensor, dim)])]


def _split(tensor: TracedTensor, size: int | Sequence[int], dim: int = 0) -> list[TracedTensor]:
    total = tensor.shape[_dim(tensor, dim)]
    sizes = [min(size, total - start) for start in range(0, total, size)] if isinstance(size, int) else list(size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(tensor, dim, start, start + length) for start, length in zip(starts, sizes, strict=True)]


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> TracedTensor:
    # torch concatenates an empty tensor of one dimension with tensors of any shape.
    parts = [_traced(tensor) for tensor in tensors if tuple(tensor.shape) != (0,)] or [_traced(tensors[0])]
    first, dim = parts[0], _dim(parts[0], dim)
    shape = [*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :]]
    for part in parts:
        if part.dtype != first.dtype or [*part.shape[:dim], *part.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]]:
            shapes = f"{list(first.shape)} and {list(part.shape)}"
            raise RuntimeError(
                f"tensors of {shapes} ({first.dtype} and {part.dtype}) can't be concatenated along dimension {dim}"
            )
    return TracedTensor(shape, first.dtype, regions.concatenate([(tuple(part.shape), part.regions) for part in parts], dim))


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> TracedTensor:
    dim = _dim(tensors[0], dim, extra=1)
    return _cat([_unsqueeze(_traced(tensor), dim) for tensor in tensors], dim)


def _unsqueeze(tensor: TracedTensor, dim: int) -> TracedTensor:
    dim = _dim(tensor, dim, extra=1)
    return TracedTensor([*tensor.shape[:dim], 1, *tensor.shape[dim:]], tensor.dtype, regions.add_dim(tensor.regions, dim))


def _squeeze(tensor: TracedTensor, dims: int | Sequence[int] | None = None) -> TracedTensor:
    candidates = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    result = _same(tensor)
    for dim in sorted({_dim(tensor, candidate) for candidate in candidates}, reverse=True):
        if tensor.dim() and tensor.shape[dim] == 1:
            shape = [*result.shape[:dim], *result.shape[dim + 1 :]]
            result = TracedTensor(shape, tensor.dtype, regions.drop_dim(result.regions, dim))
    return result


def _expand(tensor: TracedTensor, shape: Sequence[int], **_: Any) -> TracedTensor:
    added = len(shape) - tensor.dim()
    for _i in range(added):
        tensor = _unsqueeze(tensor, 0)
    new_shape = tuple(old if size == -1 else size for size, old in zip(shape, tensor.shape, strict=True))
    return TracedTensor(new_shape, tensor.dtype, regions.expand(tensor.regions, tuple(tensor.shape), new_shape))


def _same(tensor: TracedTensor, **_: Any) -> TracedTensor:
    return TracedTensor(tensor.shape, tensor.dtype, tensor.regions)


def _to_copy(tensor: TracedTensor, *, dtype: torch.dtype | None = None, **_: Any) -> TracedTensor:
    if dtype not in (None, tensor.dtype):
        raise NotTraceable(f"a cast from {tensor.dtype} to {dtype}")
    return _same(tensor)


def _traced(tensor: torch.Tensor) -> TracedTensor:
    if not isinstance(tensor, TracedTensor):
        raise NotTraceable("the operation uses a tensor that is not from the checkpoint")
    return tensor


_RULES: dict[Any, Callable[..., Any]] = {
    aten.view: _reshape, aten._unsafe_view: _reshape, aten.reshape: _reshape,
    aten.permute: _permute, aten.transpose: _transpose, aten.t: _transpose,
    aten.slice: _slice, aten.select: _select, aten.unbind: _unbind, aten.split: _split, aten.split_with_sizes: _split,
    aten.cat: _cat, aten.stack: _stack, aten.unsqueeze: _unsqueeze, aten.squeeze: _squeeze, aten.expand: _expand,
    aten.clone: _same, aten.detach: _same, aten.alias: _same, aten.lift_fresh: _same, aten._to_copy: _to_copy,
}  # fmt: skip
