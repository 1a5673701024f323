"""Collate samples of different lengths into a batch.

Padding is distinguished from content by position, not by id. If the pad token is also the end-of-turn token, as in OPT, the
model must still learn to write it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zero_sft.data.packing import position_ids
from zero_sft.data.tokenize import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


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

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        """Return the tensors of a batch, all int64.

        - Padded samples: `input_ids`, `labels` and `attention_mask`, each (samples, longest). The mask depends only on lengths.
        - Packed rows: `position_ids` instead of the mask. They restart with each sample, and with the padding at the end.
        - Flat rows: `row_lengths` (rows,) in addition, the number of tokens in each row.
        """
        return self._packed(samples) if "seq_lengths" in samples[0] else self._padded(samples)

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        lengths = [len(sample["input_ids"]) for sample in samples]
        width = _round_up(max(lengths), self.multiple_of)
        batch = _padded_tensors(samples, width, self.pad_token_id)
        batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        return batch

    def _packed(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        rows = [{name: list(row[name]) for name in ("input_ids", "labels", "seq_lengths")} for row in samples]
        row_lengths = [len(row["input_ids"]) for row in rows]
        if self.flat:
            rows = [{name: [value for row in rows for value in row[name]] for name in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        width = _round_up(longest, self.multiple_of)
        batch = _padded_tensors(rows, width, self.pad_token_id)
        batch["position_ids"] = torch.tensor([position_ids(row["seq_lengths"], width) for row in rows])
        if self.flat:
            batch["row_lengths"] = torch.tensor(row_lengths)
        return batch


def _round_up(length: int, unit: int | None) -> int:
    """Round `length` up to a multiple of `unit`."""
    unit = unit or 1
    return -(-length // unit) * unit


def _padded_tensors(samples: Sequence[Mapping[str, Sequence[int]]], width: int, pad: int) -> dict[str, "torch.Tensor"]:
    """Return `input_ids` and `labels`, each (samples, width) int64, padded on the right."""
    import torch

    batch = {
        "input_ids": torch.full((len(samples), width), pad, dtype=torch.int64),
        "labels": torch.full((len(samples), width), IGNORE_INDEX, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        for name, tensor in batch.items():
            tensor[row, : len(sample[name])] = torch.tensor(sample[name], dtype=torch.int64)
    return batch
