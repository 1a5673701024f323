"""Parse one turn of a conversation: its role, text, thoughts, calls, marks and other keys. Pure.

A turn's role and text are `role` and `content`, or `from` and `value`. Turns have few notes (`HARMLESS_OF_TURNS`), so any other
unknown key of a turn is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, SYSTEM, THOUGHTS_FIELDS, TOOL, USER, Turn
from zero_sft.data.samples.key_meanings import Meaning, is_empty, meaning_of, word_set
from zero_sft.data.samples.marks import MARKS, RANGES, trained_ranges, weight_of_turn
from zero_sft.data.samples.tools import CALL_KEYS, parse_call_text, parse_calls
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

CALL = "call"
"""The role of a turn whose text is a call: other tools write calls as turns."""

ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), TOOL),
    **dict.fromkeys(("tool_call", "function_call"), CALL),
}
"""The data's names of roles, in lower case. Templates that have a developer render it as they render a system text."""

_KEY_PAIRS = (("role", "content"), ("from", "value"))

_THOUGHTS_BEFORE_CALL = re.compile(r"\s*<think>.*?</think>\s*(?=[\[{])", re.DOTALL)

_TOOL_NOTES = ("name", "tool_call_id")
"""The keys of a tool's turn that name the tool and the call."""

HARMLESS_OF_TURNS = word_set(
    "id idx index uuid turn turn_id turn_identifier message_id parent_id timestamp create_time created_at date time language "
    "lang country header state hashed_ip user_id author avatar model source redacted toxic score rating category topic tags "
    "metadata num_tokens token_count tokens length"
)


def parse_turn(raw: Any, place: str, names: tuple[str, str]) -> tuple[str, Turn, list[str]]:
    """Parse one turn; return its role, which may be `CALL`, the turn, and the keys that are not read."""
    if isinstance(raw, Mapping):
        names = next((pair for pair in (names, *_KEY_PAIRS) if raw.get(pair[0]) is not None), names)
    role_name, text = (raw.get(name) for name in names) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(role_name, str):
        raise _bad_turn(raw, place, names)
    role = ROLES.get(role_name.strip().lower())
    if role is None:
        raise DataError(
            f"{place}: unknown role {excerpt(repr(role_name))}; expected one of {', '.join(ROLES)}.", code="data.unknown_role"
        )
    is_answer = role in (ASSISTANT, CALL)
    read = {*names, *MARKS, RANGES, *((*CALL_KEYS, *THOUGHTS_FIELDS) if is_answer else _TOOL_NOTES if role == TOOL else ())}
    unread = _unread_keys(raw, place, read=read)
    calls = parse_calls(raw, place) if role == ASSISTANT else ()
    content = _join_parts(text, place, raw, names)
    if content is None and not calls:
        raise _bad_turn(raw, place, names)
    content = content or ""
    require_unicode(content, place)
    weight = weight_of_turn(raw, place, is_answer=is_answer)
    ranges = trained_ranges(raw, content, place, is_answer=is_answer)
    if role == CALL:
        block = _THOUGHTS_BEFORE_CALL.match(content)  # as LLaMA-Factory writes them
        text, call = (block[0].strip(), content[block.end() :]) if block else ("", content)
        thoughts = _thoughts(raw, text, place)
        calls = parse_call_text(call, place)
        return role, Turn(role=ASSISTANT, text=text, thoughts=thoughts, calls=calls, weight=weight), unread
    turn = Turn(role=role, text=content, weight=weight, trained_ranges=ranges, calls=calls)
    if is_answer:
        turn = replace(turn, thoughts=_thoughts(raw, content, place))
    elif role == TOOL:
        name, call_id = (_note(raw, key, place) for key in _TOOL_NOTES)
        turn = replace(turn, name=name, call_id=call_id)
    return role, turn, unread


def _join_parts(text: Any, place: str, raw: Any, names: tuple[str, str]) -> str | None:
    """Return a turn's text, which may be a list of parts of text; None if there is none. Raises `DataError`."""
    if text is None or isinstance(text, str):
        return text
    if not isinstance(text, list):
        raise _bad_turn(raw, place, names)
    joined = []
    for number, raw_part in enumerate(text, start=1):
        part = {"text": raw_part} if isinstance(raw_part, str) else raw_part if isinstance(raw_part, Mapping) else {}
        is_text = part.get("type") in (None, "text", "input_text", "output_text") and isinstance(part.get("text"), str)
        if not is_text or any(not is_empty(value) for key, value in part.items() if key not in ("type", "text")):
            raise DataError(
                f'{place}, part {number}: expected a part of text, {{"type": "text", "text": ...}}; got {excerpt(raw_part)}. '
                "Only text is trained on: remove the part, or leave the sample out.",
                code="data.turn_not_only_text",
            )
        joined.append(part["text"])
    return "".join(joined)


def _thoughts(raw: Mapping[str, Any], content: str, place: str) -> str:
    """Return the thoughts in the fields of an answer, unless its text has them as well; raises `DataError`."""
    given = {key: raw[key] for key in THOUGHTS_FIELDS if not is_empty(raw.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{place}: `{key}` must be a text; got {excerpt(value)}.", code="data.thoughts_not_a_text")
        require_unicode(value, place)
    texts = {value.strip() for value in given.values()}
    if len(texts) > 1:
        raise DataError(
            f"{place}: {' and '.join(f'`{key}`' for key in given)} hold different thoughts. Keep one of them.",
            code="data.thoughts_twice",
        )
    thoughts = next(iter(given.values()), "")
    if thoughts and "</think>" in content:
        before, _, _ = content.partition("</think>")
        if before.replace("<think>", "", 1).strip() == thoughts.strip():
            return ""
        raise DataError(
            f"{place}: thoughts in the text, up to </think>, and other thoughts in `{next(iter(given))}`. Keep one of them.",
            code="data.thoughts_twice",
        )
    return thoughts


def _note(raw: Mapping[str, Any], key: str, place: str) -> str:
    """Return the name or the id of a tool's turn; raises `DataError` if it is not a text."""
    value = raw.get(key)
    if value is not None and not isinstance(value, str | int):
        raise DataError(f"{place}: `{key}` must be a text; got {excerpt(value)}.", code="data.bad_turn")
    return "" if value is None else str(value)


def _bad_turn(raw: Any, place: str, names: Sequence[str]) -> DataError:
    """Make the error for a turn whose role or text is not a string."""
    mismatch = f'{place}: expected {{"{names[0]}": ..., "{names[1]}": ...}} with texts; got {excerpt(raw)}.'
    role, text = (raw.get(name) for name in names) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(role, str):
        return DataError(mismatch, code="data.bad_turn")
    if text is None:
        return DataError(
            f'{mismatch} Give `{names[1]}` a text, "" for a turn without one, or remove the turn.',
            code="data.turn_without_text",
        )
    return DataError(f"{mismatch} Write `{names[1]}` as one text.", code="data.turn_text_is_no_text")


def _unread_keys(turn: Mapping[str, Any], place: str, *, read: set[str]) -> list[str]:
    """Return a turn's keys that are not read; raise `DataError` for a harmful one. `read` are the keys that are."""
    notes = []
    for key, value in turn.items():
        if key in read or is_empty(value):
            continue
        if key in HARMLESS_OF_TURNS:
            notes.append(key)
            continue
        raise DataError(f"{place}: {_why_refused(excerpt(key), meaning_of(key, 'messages'))}", code="data.key_refused")
    return notes


def _why_refused(key: str, meaning: Meaning | None) -> str:
    if key in (*THOUGHTS_FIELDS, *CALL_KEYS):
        return f"`{key}` is read only in answers. Move it to the answer, or remove it."
    if key in _TOOL_NOTES:
        return f"`{key}` is read only in the turn of a tool. Remove it, or write it into the text."
    if meaning == Meaning.MASK:
        return f'`{key}` is not read in a turn: it is {meaning}. Use "train": true or false instead, or remove it.'
    if meaning:
        return f"`{key}` is not read in a turn: it is {meaning}. Write it into the text, or remove it."
    return (
        f"unknown key `{key}` in a turn; it might select what is trained on. Remove it. Known keys are "
        f"{', '.join(MARKS)}, and notes such as id and timestamp."
    )


def require_unicode(text: str, place: str) -> None:
    """Raise `DataError` for half a character, which JSON can hold but UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text contains half a character (a lone surrogate). Repair the text.", code="data.lone_surrogate"
        ) from error
