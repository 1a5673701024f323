"""Collate samples of different lengths into a batch.

Padding is distinguished from content by position, not by id. If the pad token is also the end-of-turn token, as in OPT, the
model must still learn to write it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from zero_sft.data.packing import position_ids
from zero_sft.data.tokenize import IGNORE_INDEX, WEIGHTS

LOSS_WEIGHTS = "loss_weights"
"""The tensor of a batch with the weights of its tokens in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Collate samples, or packed rows, into a batch padded to the longest, rounded up to a multiple of `multiple_of`.

    Padding is on the right, whatever the tokenizer's padding side: no token attends to it, and positions begin at 0. With
    padding on the left, the loss of a model with learned positions (GPT-2) would depend on the other samples of the batch.

    `flat` concatenates packed rows into one row without padding between them, as flash attention takes packed samples. Other
    attention kernels would compute the attention of every row to every other.
    """

    pad_token_id: int
    multiple_of: int | None = None
    flat: bool = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch, all int64 but the weights.

        - Padded samples: `input_ids`, `labels` and `attention_mask`, each (samples, longest). The mask depends only on lengths.
        - Packed rows: `position_ids` instead of the mask. They restart with each sample, and with the padding at the end.
        - Samples with weights: `loss_weights` in addition, float32, 1 where a sample has none.
        - Flat rows: `row_lengths` (rows,) in addition, the number of tokens in each row.
        """
        rows, lengths = samples, torch.tensor([len(sample["input_ids"]) for sample in samples])
        is_packed = "seq_lengths" in samples[0]
        if self.flat and is_packed:
            names = [name for name in ("input_ids", "labels", WEIGHTS, "seq_lengths") if name in samples[0]]
            rows = [{name: list(chain.from_iterable(row[name] for row in samples)) for name in names}]
        unit = self.multiple_of or 1
        width = -(-max(len(row["input_ids"]) for row in rows) // unit) * unit
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], width, self.pad_token_id),
            "labels": _padded([row["labels"] for row in rows], width, IGNORE_INDEX),
        }
        if WEIGHTS in rows[0]:
            weights = [row[WEIGHTS] or [1.0] * len(row["input_ids"]) for row in rows]
            batch[LOSS_WEIGHTS] = _padded(weights, width, 0, torch.float32)
        if not is_packed:
            return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
        batch["position_ids"] = torch.tensor([position_ids(row["seq_lengths"], width) for row in rows])
        return {**batch, "row_lengths": lengths} if self.flat else batch


def _padded(rows: Sequence[Sequence[float]], width: int, value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return the rows as a tensor (rows, width), padded on the right with `value`."""
    tensor = torch.full((len(rows), width), value, dtype=dtype)
    for number, row in enumerate(rows):
        tensor[number, : len(row)] = torch.tensor(row, dtype=dtype)
    return tensor
