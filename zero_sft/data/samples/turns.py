"""Parse the turns of a conversation, and join those that belong together. Pure."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, Turn
from zero_sft.data.samples.turn import CALL, parse_turn
from zero_sft.errors import DataError

Reasoning = Literal["field", "inline", "drop"]
"""The values of `--reasoning`: thoughts in a field of a turn are given to the template, joined to the text, or dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurns:
    """Turns with their `numbers` in the data, the keys that are not read, and counts of what was changed, by description."""

    turns: list[Turn]
    numbers: list[int]
    unread_keys: tuple[str, ...] = ()
    changes: Counter[str] = field(default_factory=Counter)


def parse_turns(
    raw: Any, key: str, where: str, *, names: tuple[str, str], reasoning: Reasoning = "field", merge: bool = False
) -> ParsedTurns:
    """Parse a list of turns; check roles and texts.

    Args:
        key: the sample's key that holds the list, for the keys that are not read, such as `messages.id`.
        names: the usual keys of a turn's role and text, for messages.
        merge: join consecutive texts of the system, the user or the assistant.

    Raises:
        DataError: not a list of turns, or a turn that can't be used.
    """
    if not isinstance(raw, list):
        got = "a text" if isinstance(raw, str) else type(raw).__name__
        remedy = "Write the list itself, not as text" if isinstance(raw, str) else "Write a list"
        raise DataError(
            f'{where}: `{key}` must be a list of turns; got {got}. {remedy}: [{{"{names[0]}": ..., "{names[1]}": ...}}, ...].',
            code="data.turns_not_a_list",
        )
    turns, numbers, unread, changes = list[Turn](), list[int](), dict[str, None](), Counter[str]()
    for number, raw_turn in enumerate(raw, start=1):
        place = f"{where}, turn {number}"
        role, turn, unread_keys = parse_turn(raw_turn, place, names)
        unread.update(dict.fromkeys(unread_keys))
        turn = _place_thoughts(turn, reasoning, changes)
        previous = turns[-1] if turns else None
        is_call_of_answer = role == CALL and previous is not None and previous.role == ASSISTANT
        is_repeated = merge and previous is not None and previous.role == turn.role != TOOL
        if previous is not None and (is_call_of_answer or is_repeated):
            turns[-1] = _join(previous, turn, place)
            changes["turns merged with the previous one of the same speaker"] += not is_call_of_answer
        else:
            turns.append(turn)
            numbers.append(number)
    return ParsedTurns(turns=turns, numbers=numbers, unread_keys=tuple(f"{key}.{note}" for note in unread), changes=changes)


def _place_thoughts(turn: Turn, reasoning: Reasoning, changes: Counter[str]) -> Turn:
    """Leave an answer's thoughts in their field, write them into the text, or drop them."""
    if not turn.thoughts or reasoning == "field":
        return turn
    if reasoning == "drop":
        changes["thoughts of answers dropped (--reasoning drop)"] += 1
        return replace(turn, thoughts="")
    return replace(turn, text=f"<think>\n{turn.thoughts.strip()}\n</think>\n\n{turn.text}", thoughts="")


def _join(turn: Turn, other: Turn, place: str) -> Turn:
    """Join a turn with the next one of the same speaker; raises `DataError` if their marks for the loss differ."""
    if turn.weight != other.weight or turn.trained_ranges != other.trained_ranges:
        raise DataError(
            f"{place}: this turn continues the previous one, but is marked otherwise for the loss. Mark both alike.",
            code="data.joined_turns_differ",
        )
    return replace(
        turn,
        text="\n\n".join(text for text in (turn.text, other.text) if text),
        thoughts="\n\n".join(text for text in (turn.thoughts, other.thoughts) if text),
        calls=(*turn.calls, *other.calls),
    )
