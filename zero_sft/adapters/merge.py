"""Merge an adapter into its sharded base model, without a gather of base weights.

The product of an adapter's two small matrices has the shape of the weight. Each rank computes it, one module at a time, and
adds its flat range to its shard. With DoRA the merged rows are scaled to their trained length; the ranks sum the squares of the
elements that they hold. The arithmetic is that of PEFT's own `merge`, in the weight's dtype.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from zero_sft.adapters import peft_internals
from zero_sft.cluster.control_group import all_gather_tensors
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError
from zero_sft.plan.partition import FlatRange
from zero_sft.zero import shards


def require_mergeable(adapted: Any) -> None:
    """Check that the adapter can be merged. Any rank; does not communicate.

    Raises:
        ExportError: it is of a kind that is merged otherwise, has a bias that the base module lacks, or belongs to a weight
            that another module shares.
    """
    uses = Counter(id(param) for _, param in adapted.named_parameters(remove_duplicate=False))
    for name, layer in peft_internals.adapted_layers(adapted):
        problem = peft_internals.obstacle_to_merging(layer)
        if not problem and uses[id(peft_internals.adapted_parameter(layer))] > 1:
            problem = "belongs to a weight that another module shares, which would change as well"
        if not problem and shards.holds_codes(peft_internals.adapted_parameter(layer)):
            problem = "belongs to a weight in 4 bits"
        if problem:
            raise ExportError(
                f"the adapter of {peft_internals.base_name(name + '.base_layer.')} {problem}, so it can't be merged. Save the "
                "adapter alone.",
                code="adapter.not_mergeable",
            )


def merge(adapted: Any, world: World) -> None:
    """Add the adapter to the base weights, in place; then forward uses these alone. Every rank; communicates.

    A training can't go on afterwards. What is merged already stays as it is: an export that failed is tried again elsewhere.

    Raises:
        ExportError: as `require_mergeable`.
    """
    require_mergeable(adapted)
    for _, layer in reversed(list(peft_internals.adapted_layers(adapted))):  # of nested ones the inner first
        if peft_internals.is_merged(layer):
            continue
        own = [param for name, param in layer.named_parameters() if not name.startswith("base_layer.")]
        with torch.no_grad(), GatheredParameters(own):
            _merge_layer(layer, world)
        peft_internals.mark_merged(layer)


def _merge_layer(layer: Any, world: World) -> None:
    param = peft_internals.adapted_parameter(layer)
    if not shards.is_sharded(param):
        raise ExportError("the base model is not sharded: merge the adapter with PEFT.", code="adapter.not_mergeable")
    shape = shards.full_shape(param)
    with shards.new_values(param, keep=True) as (flat_range, values):
        is_whole = flat_range.numel == shards.full_numel(param)
        values.copy_(merged_values(layer, shape, flat_range, values, None if is_whole else world))


def merged_values(
    layer: Any, shape: tuple[int, ...], flat_range: FlatRange, values: torch.Tensor, world: World | None
) -> torch.Tensor:
    """Return elements of a weight with its adapter merged. The adapter's parameters are gathered.

    Every rank, and communicates with DoRA; with `world` None any rank.

    Args:
        shape: the weight's full shape.
        flat_range: the elements.
        values: their values in the base model.
        world: the ranks, each of which has a part of the elements; None: this rank has all.
    """
    delta = peft_internals.delta(layer, shape).reshape(-1)[flat_range.start : flat_range.stop]
    merged = values + delta.to(values.device, values.dtype)
    magnitude = peft_internals.dora_magnitude(layer)
    if magnitude is None:
        return merged
    rows = _rows(flat_range, shape, by_column=magnitude.by_column, device=merged.device)
    norms = _norms(merged, rows, len(magnitude.values), world)
    return (magnitude.values.to(merged.device, merged.dtype) / norms)[rows] * merged


def _rows(flat_range: FlatRange, shape: tuple[int, ...], *, by_column: bool, device: torch.device) -> torch.Tensor:
    """Return for each element the row (or column) to whose length it counts."""
    positions = torch.arange(flat_range.start, flat_range.stop, device=device)
    return positions % shape[1] if by_column else positions // shape[1]


def _norms(merged: torch.Tensor, rows: torch.Tensor, count: int, world: World | None) -> torch.Tensor:
    """Return the lengths of all rows in the weight's dtype.

    Args:
        world: the ranks, each of which holds a part of the elements; None: this rank holds all.
    """
    squares = torch.zeros(count, dtype=torch.float32, device=merged.device)
    squares.index_add_(0, rows, merged.float().square())
    if world is not None:
        squares = torch.stack(list(all_gather_tensors(world, squares.cpu()))).sum(0).to(merged.device)
    return squares.sqrt().to(merged.dtype)


def merged_tensors(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a merged model under the base model's names. Modules that were trained as a whole replace theirs."""
    for name, tensor in adapted.state_dict(keep_vars=True).items():
        base_name = peft_internals.base_name(name)
        if base_name is not None:
            yield base_name, tensor
