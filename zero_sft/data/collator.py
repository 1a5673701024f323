"""Samples of several lengths to one batch.

Padding is told from content by position, never by id: where the pad token is the end-of-turn token, as in OPT, the model must
still learn to write it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zero_sft.data.labels import IGNORED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingCollator:
    """Samples of several lengths to one batch, padded to the longest, or to a multiple of `multiple_of` beyond it."""

    pad_token_id: int
    padding_side: str = "right"
    multiple_of: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, "torch.Tensor"]:
        """`input_ids`, `labels` and `attention_mask`, each (samples, longest) int64; the mask follows the lengths alone."""
        import torch

        lengths = [len(each["input_ids"]) for each in samples]
        unit = self.multiple_of or 1
        width = -(-max(lengths) // unit) * unit
        shape = (len(samples), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(width - length, width) if self.padding_side == "left" else slice(length)
            batch["input_ids"][row, place] = torch.tensor(sample["input_ids"], dtype=torch.int64)
            batch["labels"][row, place] = torch.tensor(sample["labels"], dtype=torch.int64)
            batch["attention_mask"][row, place] = 1
        return batch
