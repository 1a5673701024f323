"""What a trained token costs: the tokens that are computed for it, padding included, by how batches are made. Pure."""

import random
from collections.abc import Sequence

PACKED, ALIKE, AT_RANDOM = "packed", "alike", "at random"
"""How batches are made: of packed rows, of samples of like length, of samples at random."""


def padded_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens of batches of samples in this order, each padded to the longest of its batch.

    Worked example: lengths 3, 1, 2 in batches of 2: 3 + 3 and 2 → 8.
    """
    batches = (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))
    return sum(max(batch) * len(batch) for batch in batches)


def cost_lines(
    lengths: Sequence[int], *, trained_tokens: int, window: int, packed_rows: int | None, batch_size: int, chosen: str
) -> list[str]:
    """For a person: the cost of each way to make batches, and which is the job's.

    Args:
        lengths: of the samples, in tokens.
        window: the longest length, in tokens, to which FastChat pads.
        packed_rows: rows of `window` tokens that the samples are packed into; None where they are not.
        batch_size: samples of a batch.
        chosen: the job's way.
    """
    mixed = random.Random(0).sample(list(lengths), len(lengths))
    costs = {
        PACKED: ((packed_rows or 0) * window, f"packed into rows of {window:,}"),
        ALIKE: (padded_tokens(sorted(lengths), batch_size), f"in batches of {batch_size} of like length"),
        AT_RANDOM: (padded_tokens(mixed, batch_size), f"in batches of {batch_size} at random"),
        "FastChat": (len(lengths) * window, f"each padded to {window:,}, as FastChat does"),
    }
    if packed_rows is None:
        del costs[PACKED]
    return [
        "tokens computed for each that is trained on:",
        *(f"{tokens / trained_tokens:9.2f}  {what}{' (the job)' * (way == chosen)}" for way, (tokens, what) in costs.items()),
    ]
