"""Find out from the tokens of a batch which samples are in it, so that a message can name their places.

Rows do not carry their places through packing and collating. A search takes a moment, and is needed only after a fault.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import torch


def samples_of_batch(batch: Mapping[str, "torch.Tensor"]) -> list[list[int]]:
    """Return the token ids of each sample of a collated batch, without padding.

    Packed rows are divided where positions restart. The padding at the end of a packed row is returned as a sample.
    """
    found = []
    if "attention_mask" in batch:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            found.append([token for token, kept in zip(ids, mask, strict=True) if kept])
        return found
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        for token, position in zip(ids, positions, strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return found


def find_places(samples: "datasets.Dataset", wanted: Iterable[Sequence[int]]) -> list[str]:
    """Return the places of the samples with these token ids. One that is not found, and every one of lazy data, is left out.

    Args:
        samples: with the columns `input_ids`, `length` and `place`.
    """
    if "place" not in samples.column_names:
        return []
    lengths: Any = samples.with_format("numpy", columns=["length"])[:]["length"]
    places = []
    for ids in wanted:
        for index in np.flatnonzero(lengths == len(ids)):
            row = samples[int(index)]
            if row["input_ids"] == list(ids):
                places.append(row["place"])
                break
    return places
