"""Samples of several lengths to one batch.

Padding is told from content by position, never by id: where the pad token is the end-of-turn token, as in OPT, the model must
still learn to write it.
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
    """Samples, or rows of packed samples, to one batch, padded to the longest, or to a multiple of `multiple_of` beyond it.

    Padding is at the right, whatever the tokenizer's side: no token sees it there, and positions begin at 0. At the left
    the loss of a model that looks its positions up (GPT-2) would depend on the other samples of the batch.
    `flat` lays packed rows behind each other in one, without padding: that is how flash attention takes packed samples; other
    kinds would compare every row with every other.
    """

    pad_token_id: int
    multiple_of: int | None = None
    flat: bool = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        """`input_ids` and `labels`, each (samples, longest) int64, and of that shape `attention_mask`, after the lengths alone;
        or, of packed rows, `position_ids`, which begin anew with each sample, the padding one of its own. Flat rows also
        have `row_lengths` (rows,): how many tokens each has.
        """
        return self._packed(samples) if "seq_lengths" in samples[0] else self._padded(samples)

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        lengths = [len(each["input_ids"]) for each in samples]
        width = _rounded(max(lengths), self.multiple_of)
        batch = _tokens(samples, width, self.pad_token_id)
        batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        return batch

    def _packed(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        rows = [{name: list(each[name]) for name in ("input_ids", "labels", "seq_lengths")} for each in samples]
        row_lengths = [len(each["input_ids"]) for each in rows]
        if self.flat:
            rows = [{name: [value for row in rows for value in row[name]] for name in rows[0]}]
        lengths = [len(each["input_ids"]) for each in rows]
        width = _rounded(max(lengths), self.multiple_of)
        batch = _tokens(rows, width, self.pad_token_id)
        batch["position_ids"] = torch.tensor([position_ids(each["seq_lengths"], width) for each in rows])
        if self.flat:
            batch["row_lengths"] = torch.tensor(row_lengths)
        return batch


def _rounded(length: int, unit: int | None) -> int:
    """The least multiple of `unit` from `length` on."""
    unit = unit or 1
    return -(-length // unit) * unit


def _tokens(samples: Sequence[Mapping[str, Sequence[int]]], width: int, pad: int) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels`, each (samples, width) int64, padded at the right."""
    import torch

    batch = {
        "input_ids": torch.full((len(samples), width), pad, dtype=torch.int64),
        "labels": torch.full((len(samples), width), IGNORE_INDEX, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        for name, tensor in batch.items():
            tensor[row, : len(sample[name])] = torch.tensor(sample[name], dtype=torch.int64)
    return batch
