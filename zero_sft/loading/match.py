"""A checkpoint meets its model: what of the one makes what of the other, and whether they belong together."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.conversion.convert import Mismatch, Resolution, Whole, resolve
from zero_sft.errors import CheckpointError
from zero_sft.loading.skeleton import Skeleton
from zero_sft.zero import init_weights as missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A model on its way: its skeleton, what the checkpoint has for it, and the names that will share another's tensor."""

    bare: Skeleton
    index: CheckpointIndex
    resolution: Resolution
    away: Mapping[str, str]
    threads: int

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.bare.model

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """Its whole state dict, on meta."""
        return self.bare.state

    @property
    def whole(self) -> Whole:
        """The model as conversions see it."""
        return Whole(self.model, self.state)

    def tensors(self) -> Mapping[str, Any]:
        """The model's own parameters and persistent buffers, by name."""
        return {name: each for name, each in self.model.state_dict(keep_vars=True).items() if name in self.state}

    def lacking(self) -> list[str]:
        """The names that the checkpoint does not fill and no tie provides."""
        return [name for name in self.state if name not in self.resolution.loaded and name not in self.away]


def meet(bare: Skeleton, index: CheckpointIndex, quantizer: Any, threads: int, ignore_mismatched_sizes: bool) -> Draft:
    """Match checkpoint and model, which is whole still. Any rank by itself.

    Args:
        quantizer: transformers' own, if the checkpoint is quantised.

    Raises:
        CheckpointError: a checkpoint of another model, or one that lacks most of this one's weights.
    """
    resolution = resolve(bare.model, bare.state, index.tensors, quantizer)
    if quantizer is None:  # what was dequantised is saved as any model of its kind
        setattr(bare.model, "_weight_conversions", list(resolution.rules_used))  # noqa: B010 - as in from_pretrained
    away = missing.tied_away(bare.model.all_tied_weights_keys, resolution.loaded)
    draft = Draft(bare=bare, index=index, resolution=resolution, away=away, threads=threads)
    _require_fit(draft, ignore_mismatched_sizes)
    return draft


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


def _require_fit(draft: Draft, ignore_mismatched_sizes: bool) -> None:
    """Refuse a checkpoint of another model: shapes that differ, or most of the weights absent."""
    mismatched = draft.resolution.mismatched
    if mismatched and not ignore_mismatched_sizes:
        raise CheckpointError(_misfit(draft.index.folder, mismatched), code="checkpoint.shapes_differ")
    wanted = {name: tensor.numel() for name, tensor in draft.state.items() if name not in draft.away}
    present = sum(numel for name, numel in wanted.items() if name in draft.resolution.loaded)
    if 2 * present < sum(wanted.values()):
        examples = ", ".join(sorted(draft.lacking())[:3])
        found = ", ".join(sorted(draft.index.tensors)[:3])
        raise CheckpointError(
            f"{draft.index.folder} lacks most of the model's weights ({present:,} of {sum(wanted.values()):,} elements found). "
            f"The model wants {examples}, ...; the files have {found}, .... Name a checkpoint of {type(draft.model).__name__}.",
            code="checkpoint.other_model",
        )


def _misfit(folder: str, mismatched: Sequence[Mismatch]) -> str:
    shown = "; ".join(f"{m.name}: expected {list(m.expected)}, got {list(m.got)}" for m in mismatched[:5])
    more = f" and {len(mismatched) - 5} more" if len(mismatched) > 5 else ""
    count = f"{len(mismatched)} tensors have" if len(mismatched) > 1 else "one tensor has"
    message = f"{folder}: {count} another shape than the model's: {shown}{more}."
    absent = [name for each in mismatched for name in each.absent]
    if absent:
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        return f"{message} It is made of parts, of which the files lack {absent[0]!r}{others}: fetch the checkpoint again."
    return (
        f"{message} The config and the weights are of different models, or parts are missing or too many: take both from one "
        "place, or set ignore_mismatched_sizes to have such tensors initialised anew."
    )
