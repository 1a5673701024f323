"""Which stored elements make which tensor of the model: transformers' conversion, run on provenance instead of data.

Most tensors are stored as the model wants them. Where a converter merges, splits or turns tensors (experts, fused
projections), its own operations run on `TracedTensor`s, so what comes out is what plain `from_pretrained` would compute,
element for element, without an element having been read.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.conversion import tracing
from zero_sft.conversion.keys import TensorGroup, match
from zero_sft.conversion.quantized import DequantTracer, apply_block_scales, needs_stored_dtype
from zero_sft.errors import CheckpointError
from zero_sft.plan import regions
from zero_sft.plan.plan import SourceMap, check_cover
from zero_sft.plan.regions import Regions, Shape
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.transformers_internals import internal, loading_info


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeMismatch:
    """A tensor whose stored shape, after conversion, is not the model's; and what its parts' numbering shows to be absent."""

    name: str
    expected: Shape
    got: Shape
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a checkpoint gives a model: what makes each tensor, by the model's name, and what does not fit."""

    sources: Mapping[str, SourceMap]
    stored: Mapping[str, StoredTensor]  # what regions name: the checkpoint's tensors, and pairs of them that are multiplied
    computed: Mapping[str, TensorGroup]  # tensors that come out of operations on whole tensors
    unexpected: frozenset[str]
    mismatched: tuple[ShapeMismatch, ...]
    groups: tuple[TensorGroup, ...]
    rules_used: tuple[Any, ...]  # transformers' rules that matched: its save reverts them

    @property
    def loaded(self) -> frozenset[str]:
        """The model's tensors that the checkpoint fills."""
        return frozenset(self.sources) | frozenset(self.computed)

    def by_group(self) -> Iterator[tuple[TensorGroup, list[str]]]:
        """The groups of the computed tensors, and which of them each makes."""
        for _, items in itertools.groupby(self.computed.items(), key=lambda item: id(item[1])):
            names, groups = zip(*items, strict=True)
            yield groups[0], list(names)

    @property
    def operations(self) -> list[str]:
        """The conversions that were run, by transformers' names: "MergeModulelist(dim=0)+Concatenate(dim=1)"."""
        chains = [rule.operations for rule in self.rules_used if hasattr(rule, "operations")]
        return sorted({"+".join(map(repr, chain)) for chain in chains})


class FullShapeModel:
    """A model as transformers' operations see it: its parameters whole, as `state` (on meta) has them, partitioned or not."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._state = state

    def get_parameter(self, target: str) -> torch.Tensor:
        """The parameter of that name, without data."""
        return self._state[target]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def resolve(
    model: PreTrainedModel,
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    quantizer: Any = None,
) -> Resolution:
    """Find for every tensor of the model the stored elements that fill it.

    Args:
        model: partitioned or not.
        wanted: its whole state dict, on the meta device.
        stored: the checkpoint's tensors by name.
        quantizer: transformers' own, if the checkpoint is quantised; it adds operations that dequantise.

    Raises:
        CheckpointError: parts that are missing or contradict each other, or a dtype that can't be read.
    """
    rules = internal("get_model_conversion_mapping")(model, hf_quantizer=quantizer)
    names = match(model, rules, wanted, stored)
    run_on = _Tracing(
        whole=FullShapeModel(model, wanted), wanted=wanted, stored=stored, joiner=DequantTracer(stored, quantizer)
    )
    sources: dict[str, SourceMap] = {}
    computed: dict[str, TensorGroup] = {}
    unexpected = set(names.unexpected)
    mismatched: list[ShapeMismatch] = []
    for group in names.groups:
        for name, (shape, parts) in run_on.converted(group).items():
            if name not in wanted:
                unexpected.add(name)
            elif tuple(wanted[name].shape) != shape:
                too_many = any(got > expected for got, expected in zip(shape, wanted[name].shape, strict=False))
                absent = () if too_many else tuple(group.absent())
                mismatched.append(ShapeMismatch(name=name, expected=tuple(wanted[name].shape), got=shape, absent=absent))
            elif parts is None:
                computed[name] = group
            else:
                sources[name] = SourceMap.of(name, shape, parts)
    known = {**stored, **run_on.joiner.joined}
    for source_map in sources.values():
        check_cover(source_map, known)
    return Resolution(
        sources=sources,
        stored=known,
        computed=computed,
        unexpected=frozenset(unexpected),
        mismatched=tuple(mismatched),
        groups=names.groups,
        rules_used=tuple(rule for rule in rules if rule.was_used()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tracing:
    """Groups to regions: what the conversion of a checkpoint's groups has in common."""

    whole: FullShapeModel
    wanted: Mapping[str, torch.Tensor]
    stored: Mapping[str, StoredTensor]
    joiner: DequantTracer

    def converted(self, group: TensorGroup) -> dict[str, tuple[Shape, Regions | None]]:
        """The tensors of the model that a group makes: shape, and regions unless its operations have to be run."""
        if group.rivals:
            one, other = group.rivals[0], group.stored[0]
            raise CheckpointError(
                f"{self.stored[one].file}: {one!r} and {other!r} both make the model's {group.name!r}: the checkpoint has it "
                "whole and in parts. Which of them is meant can't be known: keep one, or fetch it again.",
                code="checkpoint.whole_and_in_parts",
            )
        if group.converter is None:
            first = self.stored[next(iter(group.members))]
            _check_dtype(first)
            return {group.name: (first.shape, regions.identity_regions(first.name, first.shape, strides=first.strides))}
        dtype = self.wanted[group.name].dtype

        def traced(name: str) -> torch.Tensor:
            return tracing.source(name, self.stored[name].shape, dtype, self.stored[name].strides)

        try:
            result = run(group, self.whole, traced, loading_info(), self.joiner.install)
            for name, tensor in result.items():
                if not isinstance(tensor, tracing.TracedTensor):
                    raise tracing.NotTraceable(f"{name} came out as a {type(tensor).__name__}")
                for source in {region.source for region in tensor.regions} & self.stored.keys():
                    _check_dtype(self.stored[source])
        except (internal("SkipParameters"), tracing.NotTraceable, regions.TooManyRegions) as error:
            cause = error.__context__ if isinstance(error, internal("SkipParameters")) else error
            if isinstance(cause, (tracing.NotTraceable, regions.TooManyRegions)):
                return self._shapes(group)
            raise CheckpointError(_not_converted(group, self.stored, cause), code="checkpoint.not_convertible") from cause
        return {name: (tuple(tensor.shape), tensor.regions) for name, tensor in result.items()}

    def _shapes(self, group: TensorGroup) -> dict[str, tuple[Shape, Regions | None]]:
        """What operations that can't be traced will make, found on tensors without data."""

        def hollow(name: str) -> torch.Tensor:
            stored = self.stored[name]
            if stored.dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{stored.file}: {name!r} is stored as {stored.dtype}, which torch can't read.",
                    code="checkpoint.unsupported_dtype",
                )
            return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device="meta")

        try:
            result = run(group, self.whole, hollow, loading_info())
        except (internal("SkipParameters"), RuntimeError) as error:
            cause = error.__context__ if isinstance(error, internal("SkipParameters")) else error
            raise CheckpointError(_not_converted(group, self.stored, cause), code="checkpoint.not_convertible") from cause
        return {name: (tuple(tensor.shape), None) for name, tensor in result.items()}


def run(
    group: TensorGroup,
    model: FullShapeModel,
    source: Callable[[str], torch.Tensor],
    info: Any = None,
    prepare: Callable[[Any], None] = apply_block_scales,
) -> dict[str, Any]:
    """Run a group's converter on `source(name)` of each stored name; the tensors that it makes, by the model's names.

    Stored dtypes may differ: as in transformers, all are cast to the model's before they are merged, except for a quantizer.
    An error in an operation is raised as it is, or, where `info` (transformers' loading record) is given, as transformers'
    `SkipParameters`. `prepare` may change the converter, which is a copy.
    """
    converter = copy.deepcopy(group.converter)
    prepare(converter)
    dtype = None if needs_stored_dtype(converter) else model.get_parameter(group.name).dtype
    for pattern, names in group.members.items():
        for name in names:
            converter.add_tensor(group.name, name, pattern, source(name).to(dtype=dtype))
    raw = converter.convert(group.name, model=model, config=model.config, hf_quantizer=None, loading_info=info)
    return {name: value[0] if isinstance(value, list) else value for name, value in raw.items()}


def _not_converted(group: TensorGroup, stored: Mapping[str, StoredTensor], cause: BaseException | None) -> str:
    names, absent = group.stored, group.absent()
    where = f"{stored[names[0]].file}: {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    reason = f"there is no {cause}" if isinstance(cause, KeyError) else cause
    message = f"{where} can't be made into {group.name!r} by {', '.join(map(repr, group.converter.operations))}: {reason}."
    if absent:
        return f"{message} The checkpoint lacks {_shown(absent)}: fetch it again."
    return f"{message} The files are incomplete, or of another model than the config: take both from one place."


def _shown(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} others" if len(names) > limit else "")


def _check_dtype(tensor: StoredTensor) -> None:
    if tensor.dtype not in TORCH_DTYPES or tensor.dtype.startswith("F8"):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, and no scales for it were found under a name that "
            "goes with the config's quantization_config, so what its numbers mean can't be told. Take the whole checkpoint "
            "with its config, or an unquantised one.",
            code="checkpoint.scales_missing",
        )


def original_format(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, without data, as which plain `save_pretrained` writes a model: a checkpoint's published names and shapes.

    Args:
        state: the model's whole tensors by its own names, on the meta device.
    """
    return internal("revert_weight_conversion")(FullShapeModel(model, state), dict(state))
