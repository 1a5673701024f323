"""Compute how many tokens, padding included, a job processes per trained token, for each way to make batches. Pure."""

import random
from collections.abc import Sequence

PACKED, ALIKE, AT_RANDOM = "packed", "alike", "at random"
"""Ways to make batches: from packed rows, from samples of similar length, from random samples."""


def padded_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Count the tokens of batches of samples in this order, each sample padded to the longest of its batch.

    Worked example: lengths 3, 1, 2 in batches of 2: 3 + 3 and 2 → 8.
    """
    batches = (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))
    return sum(max(batch) * len(batch) for batch in batches)


def cost_lines(
    lengths: Sequence[int], *, trained_tokens: int, window: int, packed_rows: int | None, batch_size: int, chosen: str
) -> list[str]:
    """Format the cost of each way to make batches as lines for the user, and mark the job's way.

    Args:
        lengths: of the samples, in tokens.
        window: the maximum length in tokens, to which FastChat pads.
        packed_rows: the number of packed rows of `window` tokens; None without packing.
        chosen: the job's way to make batches.
    """
    mixed = random.Random(0).sample(list(lengths), len(lengths))
    costs = {} if packed_rows is None else {PACKED: (packed_rows * window, f"packed into rows of {window:,}")}
    costs |= {
        ALIKE: (padded_tokens(sorted(lengths), batch_size), f"in batches of {batch_size} of like length"),
        AT_RANDOM: (padded_tokens(mixed, batch_size), f"in batches of {batch_size} at random"),
        "FastChat": (len(lengths) * window, f"each padded to {window:,}, as FastChat does"),
    }
    return [
        "tokens computed for each that is trained on:",
        *(f"{tokens / trained_tokens:9.2f}  {text}{' (the job)' * (way == chosen)}" for way, (tokens, text) in costs.items()),
    ]
