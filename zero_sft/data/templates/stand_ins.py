"""Replace the texts of answers by stand-ins, to see which text a template writes around them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zero_sft.data.templates.chat import Chat, replace_leaves, string_leaves
from zero_sft.data.templates.thoughts import Answers

STAND_IN = "zerosftanswer"
"""A placeholder for a text; templates neither look for it nor strip nor escape it."""

TEXT, THOUGHTS, CALL, ECHO = "text", "thoughts", "call", "echo"
"""The kinds of pieces. An echo is a part of a call that the template repeats, for example in front of the tool's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A text to locate: the text of the answer with the index `turn`, its thoughts from a field, or a part of its calls."""

    turn: int
    text: str
    kind: str = TEXT

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which a template may write it: a part of a call also as JSON or Python, a text also stripped."""
        if self.kind in (CALL, ECHO):
            forms = (
                self.text,
                json.dumps(self.text, ensure_ascii=False)[1:-1],
                json.dumps(self.text)[1:-1],
                repr(self.text)[1:-1],
            )
        else:
            forms = (self.text, self.text.strip(), self.text.rstrip(), self.text.lstrip())
        return tuple(dict.fromkeys(forms))


def around_stand_ins(chat: Chat, answers: Answers, apply: Callable[[Chat], str]) -> tuple[list[str], list[TextPiece]] | None:
    """Render a chat with stand-ins for its answers; return the texts around the stand-ins, and the pieces to find.

    There is one text more than pieces. An answer has pieces for its text, for thoughts in a field, for the names in its calls
    and for the texts in their arguments. If the template leaves out thoughts of a field, there is no piece for them. None if it
    leaves out another piece, or writes them in an order that does not follow the answers.
    """
    word = STAND_IN
    while any(word in json.dumps(message, ensure_ascii=False) for message in chat.messages):
        word += "r"
    pieces, messages = dict[str, TextPiece](), list(chat.messages)
    for index, answer in answers.items():
        message = messages[index] = dict(messages[index])

        def stand_in(text: str, kind: str, index: int = index) -> str:
            name = f"{word}{len(pieces)}{word}"
            pieces[name] = TextPiece(turn=index, text=text, kind=kind)
            return name

        if answer.field:
            message[answer.field] = stand_in(answer.thoughts, THOUGHTS)
        if answer.text or "tool_calls" not in message:
            message["content"] = ("" if answer.field else answer.content.removesuffix(answer.text)) + stand_in(
                answer.text, TEXT
            )
        if "tool_calls" in message:
            message["tool_calls"] = [
                _call_with_stand_ins(call, lambda text: stand_in(text, CALL)) for call in message["tool_calls"]
            ]
    around = re.split(rf"({word}\d+{word})", apply(chat.with_messages(messages)))
    found = _order(around[1::2], pieces)
    return None if found is None else (around[::2], found)


def _order(names: list[str], pieces: Mapping[str, TextPiece]) -> list[TextPiece] | None:
    """Return the pieces in the order of the text; None if one is missing, repeated, or stands in another answer."""
    found, seen = list[TextPiece](), set[str]()

    def is_misplaced(piece: TextPiece) -> bool:
        is_late = any(other.turn > piece.turn for other in found)
        return is_late or (piece.kind == THOUGHTS and any(other.turn == piece.turn for other in found))

    for name in names:
        piece = pieces[name]
        if name in seen:
            if piece.kind != CALL:
                return None
            piece = replace(piece, kind=ECHO)
        elif is_misplaced(piece):
            return None
        seen.add(name)
        found.append(piece)
    is_complete = all(name in seen or piece.kind == THOUGHTS for name, piece in pieces.items())
    return found if is_complete else None


def _call_with_stand_ins(call: dict[str, Any], stand_in: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    name = stand_in(function["name"])
    value = replace_leaves(value, [stand_in(leaf) for leaf in string_leaves(value)])
    replaced = json.dumps(value, ensure_ascii=False) if isinstance(arguments, str) else value
    return {**call, "function": {"name": name, "arguments": replaced}}
