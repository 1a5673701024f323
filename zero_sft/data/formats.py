"""From files to conversations: FastChat's JSON and `messages`, each as one JSON list or as one JSON object a line.

    [{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]
    {"id": "1", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

Which it is shows from the content, not from the file's name. A conversation comes out with one set of roles, beginning with a
user's turn (after a system text, if there is one) and ending with an assistant's. As in FastChat a leading turn that isn't
the user's is dropped; unlike there, a last turn without an answer costs that turn and not the conversation. Both are
counted. A sample that has both keys is read as `conversations`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.data.text import read_text
from zero_sft.errors import DataError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_FASTCHAT_ROLES = {"human": USER, "gpt": ASSISTANT, "system": SYSTEM}
_MESSAGE_ROLES = {each: each for each in (USER, ASSISTANT, SYSTEM)}
_LAYOUTS = {
    "conversations": ("from", "value", _FASTCHAT_ROLES),
    "messages": ("role", "content", _MESSAGE_ROLES),
}
_SAMPLE = '{"conversations": [{"from": "human", "value": ...}, ...]} or {"messages": [{"role": "user", "content": ...}, ...]}'
_EXPECTED = f"expected {_SAMPLE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One speaker's text; `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that alternate between user and assistant, after at most one system text; `where` names it in messages."""

    turns: tuple[Turn, ...]
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a file holds: its conversations in order, the keys they were found under, and how many turns were dropped."""

    conversations: tuple[Conversation, ...]
    layouts: tuple[str, ...]
    leading_turns: int = 0
    unanswered_turns: int = 0


def read_conversations(path: Path) -> Reading:
    """Read all conversations of a file. Any rank by itself; does not communicate.

    Raises:
        DataError: no such file, nothing in it, not JSON, or a sample that is no conversation; with the place and the remedy.
    """
    conversations, layouts, leading, unanswered = [], set(), 0, 0
    for sample, place in _samples(path):
        where = f"{path}, {place}{_identity(sample)}"
        layout = _layout(sample, where)
        turns = _turns(sample[layout], layout, where)
        kept, without_leading, without_answer = _dialogue(turns, where)
        layouts.add(layout)
        leading += without_leading
        unanswered += without_answer
        conversations.append(Conversation(turns=kept, where=where))
    if not conversations:
        raise DataError(f"{path} holds no samples. {_EXPECTED}.")
    return Reading(
        conversations=tuple(conversations),
        layouts=tuple(sorted(layouts)),
        leading_turns=leading,
        unanswered_turns=unanswered,
    )


def _samples(path: Path) -> Iterator[tuple[Any, str]]:
    """Each sample with its place in the file, "sample 3" or "line 3", both counted from 1."""
    expected = f"{_SAMPLE}, as one JSON list or one object a line"
    text = read_text(path, expected=expected, argument="--data_path and --eval_data_path")
    if text.lstrip()[0] == "[":
        for number, sample in enumerate(_json(text, path, first_line=1), start=1):
            yield sample, f"sample {number}"
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json(line, path, first_line=number), f"line {number}"


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}; got "
            f"{_excerpt(error.doc, error.pos)}. The file must be one JSON list, or one JSON object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}, line {first_line}: JSON nested too deep to be conversations. {_EXPECTED}.") from error


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20]) if text[position:].strip() else "the end"


def _identity(sample: Any) -> str:
    name = sample.get("id") if isinstance(sample, Mapping) else None
    return f" (id {name!r})" if isinstance(name, str | int) else ""


def _layout(sample: Any, where: str) -> str:
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: {_EXPECTED}; got {type(sample).__name__}.")
    for layout in _LAYOUTS:
        if layout in sample:
            return layout
    keys = ", ".join(map(repr, list(sample)[:8])) or "none"
    raise DataError(f"{where}: neither `conversations` nor `messages`: {_EXPECTED}; got the keys {keys}.")


def _turns(raw: Any, layout: str, where: str) -> list[Turn]:
    """The turns as they stand in the file, roles and texts checked."""
    role_key, text_key, roles = _LAYOUTS[layout]
    if not isinstance(raw, list):
        raise DataError(f"{where}: `{layout}` must be a list of turns; got {type(raw).__name__}.")
    turns = []
    for number, each in enumerate(raw, start=1):
        role, text = (each.get(role_key), each.get(text_key)) if isinstance(each, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(
                f'{where}, turn {number}: expected {{"{role_key}": ..., "{text_key}": ...}} with texts; got {str(each)[:80]}.'
            )
        if role not in roles:
            raise DataError(f"{where}, turn {number}: unknown role {role!r}; expected one of {', '.join(roles)}.")
        if not _is_unicode(text):
            raise DataError(f"{where}, turn {number}: half a character (a lone surrogate) in the text. Repair the text.")
        turns.append(Turn(role=roles[role], text=text))
    return turns


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dialogue(turns: list[Turn], where: str) -> tuple[tuple[Turn, ...], int, int]:
    """A system text if there is one, then pairs of user and assistant; and how many turns were dropped in front and behind.

    Worked example: gpt, human, gpt, human → human, gpt; 1 in front, 1 behind.
    """
    start = 1 if turns and turns[0].role == SYSTEM else 0
    head, rest = turns[:start], turns[start:]
    leading = 1 if rest and rest[0].role != USER else 0
    rest = rest[leading:]
    for number, turn in enumerate(rest):
        expected = (USER, ASSISTANT)[number % 2]
        if turn.role != expected:
            raise DataError(
                f"{where}, turn {start + leading + number + 1}: roles must alternate; expected {expected}, got {turn.role}. "
                "Join or remove turns of one speaker that follow each other."
            )
    unanswered = len(rest) % 2
    return (*head, *rest[: len(rest) - unanswered]), leading, unanswered
