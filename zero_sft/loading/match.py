"""Match a checkpoint's tensors to a model's, and reject checkpoints that do not fit.

Every name of the model's state dict is in exactly one of these groups:

| names | source of their values |
| --- | --- |
| `resolution.source_maps` | read from the checkpoint, byte range by byte range |
| `resolution.untraceable` | computed from whole stored tensors (`untraceable.py`) |
| `tied_to` | shared with another name of the model |
| `missing_keys()` | initialised by the model |

`resolution.filled_names` is the union of the first two. The model's initialisation may change some of these tensors; such
tensors are complete before the reads begin, and `sharded.py` calls them `already_complete`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.conversion.convert import FullShapeModel, Resolution, ShapeMismatch, resolve
from zero_sft.errors import CheckpointError
from zero_sft.loading.skeleton import Skeleton
from zero_sft.printable import first_of
from zero_sft.transformers_internals import set_weight_conversions, tied_names
from zero_sft.zero import init_weights

_BUFFERS = re.compile(r"inv_freq$|rotary_emb\.|masked_bias$|\.attn\.bias$|\.attention\.bias$")
"""Buffers that older checkpoints store and that models compute today."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMatch:
    """A model without weights, and the checkpoint's tensors that fill it.

    `tied_to` has, for each name that shares the tensor of another name, that other name.
    """

    skeleton: Skeleton
    index: CheckpointIndex
    resolution: Resolution
    tied_to: Mapping[str, str]

    @property
    def full_shape_model(self) -> FullShapeModel:
        """The model in the form that conversions take."""
        return FullShapeModel(self.skeleton.model, self.skeleton.state)

    def collect_tensors(self) -> Mapping[str, Any]:
        """Collect the model's parameters and persistent buffers as they are now, by name."""
        state = self.skeleton.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name in self.skeleton.state}

    def missing_keys(self) -> list[str]:
        """Names that neither the checkpoint nor a tie fills."""
        filled = self.resolution.filled_names | self.tied_to.keys()
        return [name for name in self.skeleton.state if name not in filled]

    def ties_with_both_stored(self) -> list[tuple[str, str]]:
        """Tied pairs (target, source) for which the checkpoint stores both tensors."""
        ties, stored = tied_names(self.skeleton.model), self.resolution.filled_names
        return [(target, source) for target, source in ties.items() if {target, source} <= stored]


def match_checkpoint(
    skeleton: Skeleton, index: CheckpointIndex, quantizer: Any, ignore_mismatched_sizes: bool
) -> CheckpointMatch:
    """Match checkpoint and model. Any rank; does not communicate.

    Args:
        skeleton: the model in full shapes, not sharded yet.
        quantizer: transformers' quantizer, if the checkpoint is quantised.

    Raises:
        CheckpointError: the checkpoint is of another model, or lacks most of this model's weights.
    """
    model = skeleton.model
    resolution = resolve(model, skeleton.state, index.tensors, quantizer)
    if quantizer is None:  # a dequantised model is saved without its quantizer's conversions
        set_weight_conversions(model, resolution.rules_used)
    tied_to = init_weights.resolve_ties(tied_names(model), resolution.filled_names)
    match = CheckpointMatch(skeleton=skeleton, index=index, resolution=resolution, tied_to=tied_to)
    _require_fit(match, ignore_mismatched_sizes)
    return match


def left_out_parts(unexpected: Iterable[str], names: Iterable[str]) -> dict[str, int]:
    """List a checkpoint's parts that a model lacks, such as a vision tower, with their tensor counts. Pure.

    Args:
        unexpected: names of the checkpoint's tensors that the model does not have.
        names: names of the model's tensors.

    Worked example: "model.visual.blocks.0.w", for a model that has "model.layers.0.w" → "model.visual".
    """
    prefixes = {name[:end] for name in names for end in _dots(name)}
    parts: Counter[str] = Counter()
    for name in unexpected:
        if not _BUFFERS.search(name):
            parts[next((name[:end] for end in _dots(name) if name[:end] not in prefixes), name)] += 1
    return dict(sorted(parts.items()))


def _dots(name: str) -> list[int]:
    return [position for position, char in enumerate(name) if char == "."]


def _require_fit(match: CheckpointMatch, ignore_mismatched_sizes: bool) -> None:
    """Refuse a checkpoint of another model: one whose shapes differ, or which lacks most of the weights."""
    mismatched = match.resolution.mismatched
    if mismatched and not ignore_mismatched_sizes:
        raise CheckpointError(_mismatch_message(match.index.folder, mismatched), code="checkpoint.shapes_differ")
    numels = {name: tensor.numel() for name, tensor in match.skeleton.state.items() if name not in match.tied_to}
    present = sum(numels[name] for name in match.resolution.filled_names & numels.keys())
    if 2 * present < sum(numels.values()):
        class_name = type(match.skeleton.model).__name__
        missing, stored = first_of(sorted(match.missing_keys())), first_of(sorted(match.index.tensors))
        raise CheckpointError(
            f"{match.index.folder} lacks most of the model's weights ({present:,} of {sum(numels.values()):,} elements found). "
            f"The model needs {missing}; the files hold {stored}. Name a checkpoint of {class_name}.",
            code="checkpoint.other_model",
        )


def _mismatch_message(folder: str, mismatched: Sequence[ShapeMismatch]) -> str:
    shapes = (f"{key.name}: expected {list(key.expected)}, got {list(key.got)}" for key in mismatched)
    count = f"{len(mismatched)} tensors have" if len(mismatched) > 1 else "one tensor has"
    message = f"{folder}: {count} another shape than the model's: {first_of(shapes, 5, '; ')}."
    missing = [name for mismatch in mismatched for name in mismatch.missing_parts]
    if missing:
        return f"{message} The files lack {first_of(map(repr, missing), 1)}, a part of it: fetch the checkpoint again."
    return (
        f"{message} The config and the weights are of different models, or the checkpoint has too few or too many parts: take "
        "both from the same place, or set ignore_mismatched_sizes to initialise such tensors from scratch."
    )
