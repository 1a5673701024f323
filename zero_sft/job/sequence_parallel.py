"""Sequences that several ranks share (`--sequence_parallel_size`), so that longer ones fit.

Consecutive ranks form a group. All ranks of a group read the same batch, and each keeps its part of every row; labels are
shifted before, so that a part's last token learns the first of the next part. The loss of a step is the same sum over tokens,
divided by the same number. ZeRO-3 still shards over all ranks.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.collator import LOSS_WEIGHTS
from zero_sft.data.packing import is_flash
from zero_sft.data.tokenize import IGNORE_INDEX
from zero_sft.errors import ArgumentError, TrainingError
from zero_sft.rope import text_config
from zero_sft.transformers_internals import attention_function, configured_attention, replace_attention

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRank:
    """The place of a rank among those that read different batches, and its part of a row.

    Attributes:
        ranks: the number of groups of ranks that read different batches.
        rank: the number of this rank's group.
        parts: the ranks of a group.
        part: the number of this rank in its group.
    """

    ranks: int
    rank: int
    parts: int
    part: int

    @classmethod
    def of(cls, rank: int, world_size: int, parts: int) -> "DataRank":
        """Return the place of `rank`. Worked example: rank 5 of 8 with 4 parts is number 1 of group 1 of 2."""
        return cls(ranks=world_size // parts, rank=rank // parts, parts=parts, part=rank % parts)


def require_shareable(config: Any, model_class: type, attention: str | None, size: int, world_size: int) -> None:
    """Check that ranks can share the sequences of a model. Any rank; does not communicate.

    Raises:
        ArgumentError: its attention, its heads or the number of ranks don't allow it.
    """
    if size == 1:
        return
    text = text_config(config)
    heads: Any = getattr(text, "num_attention_heads", None)
    keys: Any = getattr(text, "num_key_value_heads", None) or heads
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    problem = ""
    if world_size % size:
        problem = f"it must divide the number of ranks, {world_size}"
    elif not isinstance(heads, int) or heads % size or (keys % size and size % keys):
        problem = f"it must divide the attention heads ({heads}), and divide or be a multiple of those of keys ({keys})"
    elif others:
        problem = f"{text.model_type} has layers of the kind {min(others)}, which need the whole sequence"
    elif any(getattr(text, name, None) for name in _LATENT):
        problem = f"{text.model_type} has latent attention, whose keys and values have heads of other sizes"
    elif attention not in (None, "sdpa") and not is_flash(attention):
        problem = f"the attention {attention} can't be shared: give --attn_implementation sdpa or a flash attention"
    elif "position_ids" not in inspect.signature(model_class.forward).parameters:
        problem = f"{model_class.__name__} takes no position_ids"
    if problem:
        raise ArgumentError(
            f"--sequence_parallel_size {size} can't be used: {problem}. Give another size, or leave it out.",
            code="arguments.sequence_parallel",
        )


class SharedSequences:
    """The part of a rank in each batch, and the attention over whole sequences."""

    def __init__(self, model: Any, place: DataRank, world: World) -> None:
        """Make the groups, and let the model's attention exchange parts. Every rank; communicates."""
        from deepspeed import comm

        from zero_sft.zero.ulysses import UlyssesAttention  # other runs need none of DeepSpeed's sequence parallelism

        self.place = place
        self._config = text_config(model.config)
        group = None
        for first in range(0, world.world_size, place.parts):
            ranks = list(range(first, first + place.parts))
            made = comm.new_group(ranks)
            if world.rank in ranks:
                group = made
        with collective_stage(world, "sharing sequences between ranks"):
            name = configured_attention(model.config) or "sdpa"
            core = attention_function(name)
            self._attention = UlyssesAttention(core, self._config, group, takes_positions=is_flash(name))
            replace_attention(name, self._attention)

    def own_part(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch, and the positions of all of it. Any rank; does not communicate."""
        return own_part(batch, self.place)

    @contextlib.contextmanager
    def exchanging(self, batch: dict[str, Any]) -> Iterator[None]:
        """Let attention see the whole sequences while the body runs. Removes `whole_positions` from the batch.

        Raises:
            TrainingError: a layer computed attention otherwise.
        """
        everything = batch.pop("whole_positions")
        with self._attention.active(batch["position_ids"], everything):
            yield
            if self._attention.calls < self._config.num_hidden_layers:
                raise TrainingError(
                    f"{self._config.model_type} computes attention in {self._config.num_hidden_layers} layers, and only "
                    f"{self._attention.calls} of them could be shared between ranks. Leave --sequence_parallel_size out.",
                    code="training.attention_not_shared",
                )


def own_part(batch: dict[str, Any], place: DataRank) -> dict[str, Any]:
    """Return a rank's part of a batch. Pure.

    Args:
        batch: `input_ids` and `labels`, (rows, length), and `position_ids` of packed rows. The parts divide the length.

    Returns:
        `input_ids`, `position_ids` and `shift_labels`, each (rows, length / parts). `shift_labels` has for each token the label
        of the next one, which may be in the next part. So have `loss_weights`, if the batch has them. `labels` is
        `shift_labels`; `whole_positions` is (rows, length).
    """
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    length = labels.shape[1] // place.parts
    own = slice(place.part * length, (place.part + 1) * length)
    shifted = labels[:, own].contiguous()
    weights = {}
    if LOSS_WEIGHTS in batch:
        shifted_weights = torch.nn.functional.pad(batch[LOSS_WEIGHTS], (0, 1))[:, 1:]
        weights = {LOSS_WEIGHTS: shifted_weights[:, own].contiguous()}
    return {
        **weights,
        "input_ids": batch["input_ids"][:, own].contiguous(),
        "position_ids": positions[:, own].contiguous(),
        "shift_labels": shifted,
        "labels": shifted,
        "whole_positions": positions.contiguous(),
    }
