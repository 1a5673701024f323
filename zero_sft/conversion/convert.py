"""Map stored elements to the model's tensors: transformers' conversion, run on provenance instead of data.

Most tensors are stored as the model needs them. A converter that merges, splits or transposes tensors (experts, fused
projections) runs on `TracedTensor`s. The result is, element for element, what plain `from_pretrained` would compute, but
nothing has been read.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.conversion import tracing
from zero_sft.conversion.keys import TensorGroup, match
from zero_sft.conversion.quantized import DequantTracer, needs_stored_dtype, use_configured_blocks
from zero_sft.errors import CheckpointError
from zero_sft.plan import regions
from zero_sft.plan.plan import SourceMap, check_cover
from zero_sft.plan.regions import Shape
from zero_sft.printable import first_of
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.transformers_internals import internal


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeMismatch:
    """A tensor whose converted shape differs from the model's. `missing_parts` are names that its parts' numbering lacks."""

    name: str
    expected: Shape
    got: Shape
    missing_parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The result of matching a checkpoint to a model: the sources of each tensor by the model's name, and what does not fit."""

    source_maps: Mapping[str, SourceMap]
    stored_tensors: Mapping[str, StoredTensor]  # the sources that regions name: the checkpoint's tensors, and scaled ones
    untraceable: Mapping[str, TensorGroup]  # tensors that must be computed from whole stored tensors
    unexpected: frozenset[str]
    mismatched: tuple[ShapeMismatch, ...]
    groups: tuple[TensorGroup, ...]
    rules_used: tuple[Any, ...]  # transformers' rules that matched; save_pretrained reverts them

    @property
    def filled_names(self) -> frozenset[str]:
        """The names of the model's tensors that the checkpoint fills."""
        return frozenset(self.source_maps) | frozenset(self.untraceable)

    def by_group(self) -> Iterator[tuple[TensorGroup, list[str]]]:
        """Iterate over the groups of computed tensors, each with the names of the tensors that it makes."""
        for _, items in itertools.groupby(self.untraceable.items(), key=lambda item: id(item[1])):
            names, groups = zip(*items, strict=True)
            yield groups[0], list(names)

    @property
    def operations(self) -> list[str]:
        """The conversions that ran, by transformers' names: "MergeModulelist(dim=0)+Concatenate(dim=1)"."""
        chains = [rule.operations for rule in self.rules_used if hasattr(rule, "operations")]
        return sorted({"+".join(map(repr, chain)) for chain in chains})


class FullShapeModel:
    """A view of a model, partitioned or not, that gives transformers' operations full parameters on the meta device."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._state = state

    def get_parameter(self, target: str) -> torch.Tensor:
        """Return the full parameter `target`, without data."""
        return self._state[target]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def resolve(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], stored_tensors: Mapping[str, StoredTensor], quantizer: Any = None
) -> Resolution:
    """Find the stored elements that fill each tensor of the model. Any rank; does not communicate.

    Args:
        model: partitioned or not.
        state: the model's full state dict, on the meta device.
        stored_tensors: the checkpoint's tensors by name.
        quantizer: transformers' quantizer, if the checkpoint is quantised. It adds operations that dequantise.

    Raises:
        CheckpointError: parts of a tensor are missing or contradict each other, or a dtype can't be read.
    """
    rules = internal("get_model_conversion_mapping")(model, hf_quantizer=quantizer)
    groups, unexpected = match(model, rules, state, stored_tensors)
    dequant_tracer = DequantTracer(stored_tensors, quantizer)
    tracer = _GroupTracer(model=FullShapeModel(model, state), stored_tensors=stored_tensors, dequant_tracer=dequant_tracer)
    source_maps: dict[str, SourceMap] = {}
    untraceable: dict[str, TensorGroup] = {}
    mismatched: list[ShapeMismatch] = []
    for group in groups:
        for name, tensor in tracer.trace(group).items():
            if name not in state:
                unexpected.add(name)
            elif tensor.shape != state[name].shape:
                mismatched.append(_mismatch(group, name, tuple(state[name].shape), tuple(tensor.shape)))
            elif isinstance(tensor, tracing.TracedTensor):
                source_maps[name] = SourceMap.of(name, tuple(tensor.shape), tensor.regions)
            else:
                untraceable[name] = group
    all_stored = {**stored_tensors, **dequant_tracer.scaled}
    for source_map in source_maps.values():
        check_cover(source_map, all_stored)
    return Resolution(
        source_maps=source_maps,
        stored_tensors=all_stored,
        untraceable=untraceable,
        unexpected=frozenset(unexpected),
        mismatched=tuple(mismatched),
        groups=groups,
        rules_used=tuple(rule for rule in rules if rule.was_used()),
    )


def _mismatch(group: TensorGroup, name: str, expected: Shape, got: Shape) -> ShapeMismatch:
    too_large = any(size > expected_size for size, expected_size in zip(got, expected, strict=False))
    missing_parts = () if too_large else tuple(group.missing_members())
    return ShapeMismatch(name=name, expected=expected, got=got, missing_parts=missing_parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupTracer:
    """Trace the conversion of groups of stored tensors to regions."""

    model: FullShapeModel
    stored_tensors: Mapping[str, StoredTensor]
    dequant_tracer: DequantTracer

    def trace(self, group: TensorGroup) -> dict[str, torch.Tensor]:
        """Return the tensors that a group makes, without data: `TracedTensor`s, or on the meta device if it can't be traced."""
        if group.rivals:
            rival, member = group.rivals[0], group.stored_names[0]
            raise CheckpointError(
                f"{self.stored_tensors[rival].file}: {rival!r} and {member!r} both make the model's {group.name!r}, since the "
                "checkpoint has it merged and in parts. Remove one of the two from the checkpoint, or download it again.",
                code="checkpoint.whole_and_in_parts",
            )
        dtype = self.model.get_parameter(group.name).dtype

        def traced(name: str) -> torch.Tensor:
            return tracing.trace_stored(name, self.stored_tensors[name].shape, dtype, self.stored_tensors[name].strides)

        if group.converter is None:
            _check_dtype(self.stored_tensors[group.stored_names[0]])
            return {group.name: traced(group.stored_names[0])}
        try:
            result = self._convert(group, traced, self.dequant_tracer.install)
            if not all(isinstance(tensor, tracing.TracedTensor) for tensor in result.values()):
                raise tracing.NotTraceable("the result does not come from stored tensors alone")
        except (tracing.NotTraceable, regions.TooManyRegions):
            return self._convert_on_meta(group)
        sources = {region.source for tensor in result.values() for region in tensor.regions}
        for source in sources & self.stored_tensors.keys():
            _check_dtype(self.stored_tensors[source])
        return result

    def _convert_on_meta(self, group: TensorGroup) -> dict[str, torch.Tensor]:
        for name in group.stored_names:
            _check_dtype(self.stored_tensors[name], will_be_dequantized=True)

        def meta_tensor(name: str) -> torch.Tensor:
            return torch.empty(
                self.stored_tensors[name].shape, dtype=TORCH_DTYPES[self.stored_tensors[name].dtype], device="meta"
            )

        return self._convert(group, meta_tensor, use_configured_blocks)

    def _convert(
        self, group: TensorGroup, get_tensor: Callable[[str], torch.Tensor], prepare: Callable[[Any], None]
    ) -> dict[str, Any]:
        """Run a group's converter, and name the checkpoint's files in the error of an operation."""
        try:
            return convert_group(group, self.model, get_tensor, prepare)
        except (tracing.NotTraceable, regions.TooManyRegions):
            raise
        except Exception as error:  # transformers' operations raise many types
            raise CheckpointError(
                _not_converted(group, self.stored_tensors, error), code="checkpoint.not_convertible"
            ) from error


def convert_group(
    group: TensorGroup,
    model: FullShapeModel,
    get_tensor: Callable[[str], torch.Tensor],
    prepare: Callable[[Any], None] = use_configured_blocks,
) -> dict[str, Any]:
    """Run a group's converter on the tensor `get_tensor(name)` of each stored name. Returns its results by the model's names.

    As in transformers, all tensors are cast to the model's dtype before they are merged, except those for a quantizer.

    Args:
        prepare: may change the converter, which is a copy.
    """
    converter = copy.deepcopy(group.converter)
    prepare(converter)
    dtype = None if needs_stored_dtype(converter) else model.get_parameter(group.name).dtype
    for pattern, names in group.members.items():
        for name in names:
            converter.add_tensor(group.name, name, pattern, get_tensor(name).to(dtype=dtype))
    raw = converter.convert(group.name, model=model, config=model.config, hf_quantizer=None)
    return {name: value[0] if isinstance(value, list) else value for name, value in raw.items()}


def _not_converted(group: TensorGroup, stored: Mapping[str, StoredTensor], cause: Exception) -> str:
    names, missing = group.stored_names, group.missing_members()
    where = f"{stored[names[0]].file}: {first_of(map(repr, names), 1)}"
    reason = f"there is no {cause}" if isinstance(cause, KeyError) else cause
    operations = ", ".join(map(repr, group.converter.operations))
    message = f"{where} can't be converted to {group.name!r} by {operations}: {reason}."
    if missing:
        return f"{message} The checkpoint lacks {first_of(map(repr, missing))}: download it again."
    return f"{message} The files are incomplete, or belong to another model than the config: take both from the same source."


def _check_dtype(tensor: StoredTensor, *, will_be_dequantized: bool = False) -> None:
    """Raise `CheckpointError` if torch can't read the dtype, or if it is a quantised one that no scales multiply."""
    if tensor.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, which torch can't read. "
            "Use a checkpoint in another dtype.",
            code="checkpoint.unsupported_dtype",
        )
    if tensor.dtype.startswith("F8") and not will_be_dequantized:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, but its scales were not found under a name that "
            "matches the config's quantization_config, so it can't be dequantised. Use the complete checkpoint with its "
            "config, or an unquantised checkpoint.",
            code="checkpoint.scales_missing",
        )


def published_format(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's tensors in the published format, without data: names and shapes as plain `save_pretrained` writes them.

    Args:
        state: the model's full tensors by the model's names, on the meta device.
    """
    return internal("revert_weight_conversion")(FullShapeModel(model, state), dict(state))
