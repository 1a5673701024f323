"""Options for conversations longer than the window (truncate, split, drop), and the splitting between rounds."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from zero_sft.data.samples.conversation import SYSTEM, USER, Conversation
from zero_sft.data.tokenize import TokenizedSample

TRUNCATE, SPLIT, DROP = "truncate", "split", "drop"

_TOLERANCE_TOKENS = 16
"""The largest assumed error of a predicted length: beyond it, a longer part is ruled out without tokenising it."""


def split_rounds(
    conversation: Conversation, full: TokenizedSample, window: int, tokenize: Callable[[Conversation], TokenizedSample]
) -> list[tuple[Conversation, TokenizedSample]]:
    """Split a conversation into parts of as many rounds as fit the window, each with the system text.

    A round is a question and the turns up to the next question. No round is lost: one that is longer than the window becomes a
    part alone, and the caller truncates it. This is FastChat's `split_long_conversation` in time linear in the number of
    tokens: the positions of the answers' ends in the full text predict how many rounds fit, so `tokenize` is called about twice
    per part.

    Args:
        full: the whole conversation as tokens, with its `ends`.
        window: the largest number of tokens in a part.
    """
    head = tuple(turn for turn in conversation.turns[:1] if turn.role == SYSTEM)
    starts = [number for number, turn in enumerate(conversation.turns) if turn.role == USER]
    if not starts:
        return [(conversation, full)]
    stops = [*starts[1:], len(conversation.turns)]
    tokens_up_to = _tokens_up_to(stops, full.ends)
    parts: list[tuple[Conversation, TokenizedSample]] = []
    first, extra = 0, 0  # `extra`: tokens that a part has in addition to its rounds' tokens in the full text
    while first < len(starts):
        before = tokens_up_to[first - 1] if first else 0
        fitting, failing = 0, len(starts) - first + 1  # counts of rounds known to fit, and known to be too many
        best = (conversation, full)  # replaced at once: a single round is always taken
        while failing - fitting > 1:
            expected = bisect.bisect_right(tokens_up_to, window - extra + before, first) - first
            next_length = tokens_up_to[first + fitting] - before + extra
            if fitting and not full.thoughts and next_length > window + _TOLERANCE_TOKENS:
                break
            count = min(max(expected, fitting + 1), failing - 1)
            turns = (*head, *conversation.turns[starts[first] : stops[first + count - 1]])
            part = replace(conversation, turns=turns, where=f"{conversation.where}, part {len(parts) + 1}")
            tokenized = tokenize(part)
            extra = tokenized.full_length - (tokens_up_to[first + count - 1] - before)
            if tokenized.full_length <= window or count == 1:
                fitting, best = count, (part, tokenized)
            if tokenized.full_length > window:
                failing = max(count, 2)
        parts.append(best)
        first += fitting
    return parts


def _tokens_up_to(stops: Sequence[int], ends: Sequence[tuple[int, int]]) -> list[int]:
    """Count, for each round, which ends before a turn in `stops`, the tokens of the full text up to the last answer's end."""
    turns = [turn for turn, _ in ends]
    places = [bisect.bisect_left(turns, stop) for stop in stops]
    return [ends[place - 1][1] if place else 0 for place in places]
