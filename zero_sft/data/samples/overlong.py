"""Conversations longer than the window: cut, split between rounds, or dropped."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from zero_sft.data.samples.conversation import SYSTEM, USER, Conversation
from zero_sft.data.tokenize import TokenizedSample

TRUNCATE, SPLIT, DROP = "truncate", "split", "drop"

_SURELY = 16
"""Tokens that an expected length may be wrong by."""


def split_rounds(
    conversation: Conversation, whole: TokenizedSample, window: int, tokenised: Callable[[Conversation], TokenizedSample]
) -> list[tuple[Conversation, TokenizedSample]]:
    """A conversation as several, each of as many rounds (a question and what follows it) as fit, each with the system text.

    No round is lost: one that does not fit by itself is a conversation by itself, for others to cut. As FastChat's
    `split_long_conversation`, but in a time that grows with the tokens alone: where the rounds end in the whole text tells how
    many fit, and `tokenised` is asked about twice a part.

    Args:
        whole: the conversation as tokens, with its `ends`.
        window: the most tokens of a part.
    """
    head = tuple(turn for turn in conversation.turns[:1] if turn.role == SYSTEM)
    starts = [number for number, turn in enumerate(conversation.turns) if turn.role == USER]
    if not starts:
        return [(conversation, whole)]
    stops = [*starts[1:], len(conversation.turns)]
    reached = _tokens_up_to(stops, whole.ends)
    parts: list[tuple[Conversation, TokenizedSample]] = []
    first, extra = 0, 0  # tokens that a part has more than its rounds have in the whole
    while first < len(starts):
        before = reached[first - 1] if first else 0
        fitting, failing = 0, len(starts) - first + 1  # rounds that fit, and that don't, or that there are not
        kept: tuple[Conversation, TokenizedSample] | None = None
        while failing - fitting > 1:
            expected = bisect.bisect_right(reached, window - extra + before, first) - first
            if fitting and not whole.thoughts and reached[first + fitting] - before + extra > window + _SURELY:
                break
            count = min(max(expected, fitting + 1), failing - 1)
            turns = (*head, *conversation.turns[starts[first] : stops[first + count - 1]])
            part = replace(conversation, turns=turns, where=f"{conversation.where}, part {len(parts) + 1}")
            example = tokenised(part)
            length = len(example.input_ids) + example.cut_tokens
            extra = length - (reached[first + count - 1] - before)
            if length <= window or count == 1:
                fitting, kept = count, (part, example)
            if length > window:
                failing = max(count, 2)
        if kept is None:
            raise RuntimeError("no round was tokenised")
        parts.append(kept)
        first += fitting
    return parts


def _tokens_up_to(stops: Sequence[int], ends: Sequence[tuple[int, int]]) -> list[int]:
    """For each round, which stops before a turn, the tokens up to the end of its last answer, or of the one before that."""
    turns = [turn for turn, _ in ends]
    places = [bisect.bisect_left(turns, stop) for stop in stops]
    return [ends[place - 1][1] if place else 0 for place in places]
