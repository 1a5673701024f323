"""Find in the text of a sample which parts are tools, calls, their answers and thoughts, to show them apart. Pure.

The text is searched for what the sample holds. A part that the template writes in another form is not found, and not marked.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, Conversation, Turn

TOOLS, CALL, RESULT, THOUGHTS = "tools", "call", "result", "thoughts"
KINDS = {
    TOOLS: "tools that may be called",
    CALL: "calls of tools",
    RESULT: "results of calls",
    THOUGHTS: "thoughts",
}
"""The kinds of parts, and their names for a key."""

Marked = tuple[int, int, str]
"""A half-open range of characters and its kind."""

_INLINE_THOUGHTS = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)
_LEAST = 3  # characters of a text that is looked for
_NEAR = 60  # characters between the name of a function and a brace that belongs to its call


def find_kinds(sample: Any, text: str) -> list[Marked]:
    """Return the ranges of a rendered sample that have a kind, in order and without overlaps; none of plain text."""
    if not isinstance(sample, Conversation):
        return []
    found, at = list[Marked](), 0
    for turn in sample.turns:
        for start, stop, kind in _in_turn(turn, text, at):
            found.append((start, stop, kind))
            at = max(at, stop)
        at = max(at, _end_of(text, turn.text.strip(), at))
    first_answer = next((_find(text, turn.text.strip(), 0) for turn in sample.turns if turn.role == ASSISTANT), -1)
    before = min([position for position in (first_answer, *(start for start, *_ in found)) if position >= 0], default=len(text))
    return [*_tools(sample.tools, text[:before]), *found]


def _in_turn(turn: Turn, text: str, at: int) -> Iterator[Marked]:
    """Yield the parts of a turn that are found in the text from `at` on."""
    if turn.role == TOOL and (start := _find(text, turn.text.strip(), at)) >= 0:
        yield start, start + len(turn.text.strip()), RESULT
    if turn.role != ASSISTANT:
        return
    inline = _INLINE_THOUGHTS.search(turn.text)
    thoughts = (turn.thoughts or (inline[1] if inline else "")).strip()
    if (start := _find(text, thoughts, at)) >= 0:
        yield start, start + len(thoughts), THOUGHTS
        at = start + len(thoughts)
    at = max(at, _end_of(text, turn.text.rpartition("</think>")[2].strip(), at))
    for call in turn.calls:
        start = _find(text, call.name, at)
        if start < 0:
            return
        stop = max([start + len(call.name), *(_end_of(text, leaf, start) for leaf in _leaves(json.loads(call.arguments)))])
        opening = text.rfind("{", max(at, start - _NEAR), start)
        closing = _closing(text, opening if opening >= 0 else text.find("{", start, start + len(call.name) + _NEAR))
        at = max(stop, closing)
        yield opening if 0 <= opening < start < closing else start, at, CALL


def _tools(tools: str, text: str) -> list[Marked]:
    """Return the range of the text that has the names and descriptions of the tools."""
    leaves = _leaves(json.loads(tools)) if tools else []
    places = [match.span() for leaf in leaves for match in re.finditer(rf"(?<!\w){re.escape(leaf)}(?!\w)", text)]
    if not places:
        return []
    start = text.rfind("\n", 0, min(first for first, _ in places)) + 1
    stop = text.find("\n", max(last for _, last in places))
    return [(start, len(text) if stop < 0 else stop, TOOLS)]


def _closing(text: str, opening: int) -> int:
    """Return the end of the JSON object that begins at `opening`; -1 if there is none."""
    if opening < 0:
        return -1
    try:
        return json.JSONDecoder().raw_decode(text, opening)[1]
    except ValueError:
        return -1


def _leaves(value: Any) -> list[str]:
    """Return the texts in a JSON value that are worth looking for; of an object with a `type`, its names and descriptions."""
    if isinstance(value, dict):
        keys = ("name", "description") if "type" in value else tuple(value)
        parts = [_leaves(each) for name, each in value.items() if name in keys or isinstance(each, dict | list)]
        return [leaf for part in parts for leaf in part]
    if isinstance(value, list):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value] if isinstance(value, str) and len(value) >= _LEAST else []


def _find(text: str, part: str, at: int) -> int:
    return text.find(part, at) if len(part) >= _LEAST else -1


def _end_of(text: str, part: str, at: int) -> int:
    """Return the end of a part in the text from `at` on; -1 if it is not there."""
    start = _find(text, part, at)
    return -1 if start < 0 else start + len(part)
