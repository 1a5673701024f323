"""Match a checkpoint's tensors to a model's, and reject checkpoints that do not fit.

A name of the model's state dict is one of these:

| names | where their values come from |
| --- | --- |
| `resolution.sources` | read from the checkpoint, byte range by byte range |
| `resolution.computed` | computed from whole stored tensors (`untraceable.py`) |
| `tied_to` | shared with another name of the model |
| `missing_keys()` | none of these: the model initialises them |

`resolution.loaded` are the first two. The model's own initialisation may change some of them; those are complete before the
reads begin and are called `initialised` in `sharded.py`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.conversion.convert import FullShapeModel, Resolution, ShapeMismatch, resolve
from zero_sft.errors import CheckpointError
from zero_sft.loading.skeleton import Skeleton
from zero_sft.transformers_internals import set_weight_conversions, tied_names
from zero_sft.zero import init_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMatch:
    """A model without weights, and what the checkpoint has for it.

    Attributes:
        tied_to: the names that share another's tensor, and that other's name.
    """

    skeleton: Skeleton
    index: CheckpointIndex
    resolution: Resolution
    tied_to: Mapping[str, str]

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.skeleton.model

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The model's state dict in full shapes, on the meta device."""
        return self.skeleton.state

    @property
    def whole(self) -> FullShapeModel:
        """The model as conversions see it."""
        return FullShapeModel(self.model, self.state)

    def collect_tensors(self) -> Mapping[str, Any]:
        """Collect the model's parameters and persistent buffers as they are now, by name."""
        state = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name in self.state}

    def missing_keys(self) -> list[str]:
        """The names that the checkpoint does not fill and no tie provides."""
        return [name for name in self.state if name not in self.resolution.loaded and name not in self.tied_to]

    def ties_with_both_stored(self) -> list[tuple[str, str]]:
        """Tied pairs (target, source) for which the checkpoint stores both tensors."""
        loaded = self.resolution.loaded
        ties = tied_names(self.model)
        return [(target, source) for target, source in ties.items() if target in loaded and source in loaded]


def match_checkpoint(
    skeleton: Skeleton, index: CheckpointIndex, quantizer: Any, ignore_mismatched_sizes: bool
) -> CheckpointMatch:
    """Match checkpoint and model. Any rank; does not communicate.

    Args:
        skeleton: the model in full shapes, not sharded yet.
        quantizer: transformers' own, if the checkpoint is quantised.

    Raises:
        CheckpointError: a checkpoint of another model, or one that lacks most of this one's weights.
    """
    model = skeleton.model
    resolution = resolve(model, skeleton.state, index.tensors, quantizer)
    if quantizer is None:  # what was dequantised is saved as any model of its kind
        set_weight_conversions(model, resolution.rules_used)
    tied_to = init_weights.resolve_ties(tied_names(model), resolution.loaded)
    match = CheckpointMatch(skeleton=skeleton, index=index, resolution=resolution, tied_to=tied_to)
    _require_fit(match, ignore_mismatched_sizes)
    return match


_BUFFERS = re.compile(r"inv_freq$|rotary_emb\.|masked_bias$|\.attn\.bias$|\.attention\.bias$")
"""Names that older checkpoints have for what is computed today."""


def left_out_parts(unexpected: Iterable[str], names: Iterable[str]) -> dict[str, int]:
    """The parts of a checkpoint that a model does not have, such as a vision tower, with the number of their tensors. Pure.

    Args:
        unexpected: the checkpoint's tensors that the model has no place for.
        names: the model's own tensors.

    Worked example: "model.visual.blocks.0.w", for a model that has "model.layers.0.w" → "model.visual".
    """
    known = {name[:end] for name in names for end in _dots(name)}
    parts: Counter[str] = Counter()
    for name in unexpected:
        if not _BUFFERS.search(name):
            parts[next((name[:end] for end in _dots(name) if name[:end] not in known), name)] += 1
    return dict(sorted(parts.items()))


def _dots(name: str) -> list[int]:
    return [place for place, char in enumerate(name) if char == "."]


def _require_fit(match: CheckpointMatch, ignore_mismatched_sizes: bool) -> None:
    """Refuse a checkpoint of another model: shapes that differ, or most of the weights absent."""
    mismatched = match.resolution.mismatched
    if mismatched and not ignore_mismatched_sizes:
        raise CheckpointError(_misfit(match.index.folder, mismatched), code="checkpoint.shapes_differ")
    wanted = {name: tensor.numel() for name, tensor in match.state.items() if name not in match.tied_to}
    present = sum(numel for name, numel in wanted.items() if name in match.resolution.loaded)
    if 2 * present < sum(wanted.values()):
        examples = ", ".join(sorted(match.missing_keys())[:3])
        found = ", ".join(sorted(match.index.tensors)[:3])
        raise CheckpointError(
            f"{match.index.folder} lacks most of the model's weights ({present:,} of {sum(wanted.values()):,} elements found). "
            f"The model wants {examples}, ...; the files have {found}, .... Name a checkpoint of {type(match.model).__name__}.",
            code="checkpoint.other_model",
        )


def _misfit(folder: str, mismatched: Sequence[ShapeMismatch]) -> str:
    shown = "; ".join(f"{m.name}: expected {list(m.expected)}, got {list(m.got)}" for m in mismatched[:5])
    more = f" and {len(mismatched) - 5} more" if len(mismatched) > 5 else ""
    count = f"{len(mismatched)} tensors have" if len(mismatched) > 1 else "one tensor has"
    message = f"{folder}: {count} another shape than the model's: {shown}{more}."
    absent = [name for mismatch in mismatched for name in mismatch.absent]
    if absent:
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        return f"{message} It is made of parts, of which the files lack {absent[0]!r}{others}: fetch the checkpoint again."
    return (
        f"{message} The config and the weights are of different models, or parts are missing or too many: take both from one "
        "place, or set ignore_mismatched_sizes to have such tensors initialised anew."
    )
