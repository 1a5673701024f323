"""Parse the turns of a conversation: their roles, texts, marks and other keys. Pure.

A turn with `"train": false`, `"loss": false` or `"weight": 0` is not trained on. Turns have few notes (`HARMLESS_OF_TURNS`), so
any other unknown key of a turn is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, THOUGHTS_FIELDS, Turn
from zero_sft.data.samples.key_meanings import Meaning, as_flag, is_empty, meaning_of, word_set
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

_MARKS = ("train", "loss", "weight", "loss_scale", "mask")
"""The keys of a turn that say whether it is trained on."""

HARMLESS_OF_TURNS = word_set(
    "id idx index uuid turn turn_id turn_identifier message_id parent_id timestamp create_time created_at date time language "
    "lang country header state hashed_ip user_id author avatar model source redacted toxic score rating category topic tags "
    "metadata num_tokens token_count tokens length"
)


def parse_turns(
    raw: Any, key: str, names: tuple[str, str], roles: Mapping[str, str], where: str
) -> tuple[list[Turn], tuple[str, ...]]:
    """Parse a list of turns and check roles and texts; return the turns, and their keys that are not read, as `messages.id`.

    `names` are the keys of a turn's role and text.
    """
    if not isinstance(raw, list):
        got = "a text" if isinstance(raw, str) else type(raw).__name__
        remedy = "Write the list itself, not as text" if isinstance(raw, str) else "Write a list"
        raise DataError(
            f'{where}: `{key}` must be a list of turns; got {got}. {remedy}: [{{"{names[0]}": ..., "{names[1]}": ...}}, ...].',
            code="data.turns_not_a_list",
        )
    turns, notes = [], dict[str, None]()
    for number, turn in enumerate(raw, start=1):
        place = f"{where}, turn {number}"
        if isinstance(turn, Mapping) and names[0] in turn:
            notes.update(dict.fromkeys(_unread_keys(turn, place, names=names)))
        role, text = (turn.get(name) for name in names) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            example = f'{{"{names[0]}": ..., "{names[1]}": ...}}'
            raise _bad_turn(f"{place}: expected {example} with texts; got {excerpt(turn)}.", role, text, names[1])
        if role not in roles:
            raise DataError(
                f"{place}: unknown role {excerpt(repr(role))}; expected one of {', '.join(roles)}.",
                code="data.unknown_role",
            )
        left_out = _is_left_out_of_loss(turn, place, is_answer=roles[role] == ASSISTANT)
        require_unicode(text, place)
        turns.append(Turn(role=roles[role], text=text, left_out_of_loss=left_out))
    return turns, tuple(f"{key}.{note}" for note in notes)


def _bad_turn(mismatch: str, role: Any, text: Any, name: str) -> DataError:
    """Make the error for a turn whose role or text is not a string; `mismatch` says where, what was expected and found."""
    if not isinstance(role, str):
        return DataError(mismatch, code="data.bad_turn")
    if text is None:
        return DataError(
            f'{mismatch} Give `{name}` a text, "" for a turn without one, or remove the turn.', code="data.turn_without_text"
        )
    if isinstance(text, list):
        if all(isinstance(part, Mapping) and part.get("type") == "text" for part in text):
            return DataError(f"{mismatch} A list of parts is not read: join their texts into one.", code="data.turn_in_parts")
        return DataError(
            f"{mismatch} A list of parts is not read, and only text is trained on: write the turn as one text, or leave the "
            "sample out.",
            code="data.turn_not_only_text",
        )
    return DataError(f"{mismatch} Write `{name}` as one text.", code="data.turn_text_is_no_text")


def _is_left_out_of_loss(turn: Mapping[str, Any], place: str, *, is_answer: bool) -> bool:
    """Whether an answer's marks leave it out of the loss; raise `DataError` if they ask to train on another turn."""
    verdicts = {key: _verdict(key, turn[key], place) for key in _MARKS if key in turn and not is_empty(turn[key])}
    if not is_answer:
        for key in ("train", "loss", "loss_scale"):
            if verdicts.get(key):
                raise DataError(
                    f'{place}: "{key}": {excerpt(repr(turn[key]))} asks to train on this turn, but only answers are '
                    "trained on. Remove the key.",
                    code="data.only_answers_are_trained_on",
                )
        return False
    if len(set(verdicts.values())) > 1:
        marks = " and ".join(f'"{key}": {excerpt(repr(turn[key]))}' for key in verdicts)
        raise DataError(f"{place}: {marks} contradict each other. Keep one of them.", code="data.contradicting_keys")
    return not all(verdicts.values())


def _verdict(key: str, value: Any, place: str) -> bool:
    """Whether one of a turn's marks says that the turn is trained on."""
    flag = as_flag(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if flag is None or (key == "mask" and is_number):  # a number is ambiguous: 1 may mean "train" or "leave out"
        expected = "0 or 1" if key in ("weight", "loss_scale") else "true or false"
        raise DataError(
            f'{place}: "{key}": {excerpt(repr(value))}; expected {expected}. "train": false leaves an answer out of the loss.',
            code="data.bad_value_of_key",
        )
    return flag != (key == "mask")


def _unread_keys(turn: Mapping[str, Any], place: str, *, names: Collection[str]) -> list[str]:
    """Return a turn's keys that are not read; raise `DataError` for a harmful one. `names` are the keys of role and text."""
    notes = []
    for key, value in turn.items():
        if key in names or key in _MARKS or is_empty(value):
            continue
        if key in HARMLESS_OF_TURNS:
            notes.append(key)
            continue
        raise DataError(f"{place}: {_why_refused(excerpt(key), meaning_of(key, 'messages'))}", code="data.key_refused")
    return notes


def _why_refused(key: str, meaning: Meaning | None) -> str:
    if key in THOUGHTS_FIELDS:
        return f"`{key}` is not rendered. Write it at the beginning of the text, between <think> and </think>."
    if key in ("tool_calls", "function_call"):
        return f"`{key}` is not rendered. Write it into the text, as the model writes it."
    if meaning == Meaning.MASK:
        return f'`{key}` is not read in a turn: it is {meaning}. Use "train": true or false instead, or remove it.'
    if meaning:
        return f"`{key}` is not read in a turn: it is {meaning}. Write it into the text, or remove it."
    return (
        f"unknown key `{key}` in a turn; it might select what is trained on. Remove it. Known keys are "
        f"{', '.join(_MARKS)}, and notes such as id and timestamp."
    )


def require_unicode(text: str, place: str) -> None:
    """Raise `DataError` for half a character, which JSON can hold but UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text contains half a character (a lone surrogate). Repair the text.", code="data.lone_surrogate"
        ) from error
