"""Conversations longer than the window: cut, split between rounds, or dropped."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from zero_sft.data.conversation import SYSTEM, USER, Conversation, Turn

TRUNCATE, SPLIT, DROP = "truncate", "split", "drop"


def split_rounds(conversation: Conversation, fits: Callable[[Conversation], bool]) -> list[Conversation]:
    """A conversation as several, each of as many rounds (a question and what follows it) as fit, each with the system text.

    No round is lost: one that does not fit by itself is a conversation by itself, for others to cut. As FastChat's
    `split_long_conversation`.
    """
    head = tuple(turn for turn in conversation.turns[:1] if turn.role == SYSTEM)
    parts: list[tuple[Turn, ...]] = []
    for each in _rounds(conversation.turns[len(head) :]):
        if parts and fits(replace(conversation, turns=(*head, *parts[-1], *each))):
            parts[-1] = (*parts[-1], *each)
        else:
            parts.append(each)
    return [
        replace(conversation, turns=(*head, *part), where=f"{conversation.where}, part {number}")
        for number, part in enumerate(parts, start=1)
    ]


def _rounds(turns: tuple[Turn, ...]) -> Iterator[tuple[Turn, ...]]:
    starts = [number for number, turn in enumerate(turns) if turn.role == USER]
    for start, stop in zip(starts, [*starts[1:], len(turns)], strict=True):
        yield turns[start:stop]
