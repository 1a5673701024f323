"""Check the keys of a sample and of its turns: each is read, refused, or reported in the log as not read. Pure.

Other tools use keys that this one does not read: masks, marks of bad answers, images, a second text. Training on a sample that
uses one of them would go wrong, so the sample is refused. An unknown key of a sample is taken for a note by the author of the
data, and counted. Turns have few notes (`HARMLESS_OF_TURNS`), so any other unknown key of a turn is refused.

A value without effect passes: null, an empty text or list, or a mark that selects what is trained on anyway. Arrow gives every
row all keys, so most samples of a Parquet file have such values.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zero_sft.data.samples.key_meanings import (
    MASK,
    MEDIA,
    OTHER_TEXT,
    RATING,
    SYSTEM_TEXT,
    THOUGHTS,
    TOKENS,
    TOOLS,
    as_flag,
    is_empty,
    meaning_of,
    selects_default,
    word_set,
)
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

_REMEDY = {
    MASK: 'Mark turns with "train": false instead, or remove the key.',
    RATING: "Leave out the samples with bad answers, and remove the key.",
    TOKENS: "Remove the key.",
    MEDIA: "Remove the sample, or only the key if the texts don't need it.",
    SYSTEM_TEXT: "Make it the first turn, with the role system, or remove the key.",
    THOUGHTS: "Write the thoughts at the beginning of the answer, between <think> and </think>, or remove the key.",
    TOOLS: "Write it into the texts, or remove the key.",
}

HARMLESS_OF_TURNS = word_set(
    "id idx index uuid turn turn_id turn_identifier message_id parent_id timestamp create_time created_at date time language "
    "lang country header state hashed_ip user_id author avatar model source redacted toxic score rating category topic tags "
    "metadata num_tokens token_count tokens length"
)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_UNRENDERED = ("tool_calls", "function_call")


def check_keys(
    sample: Mapping[str, Any],
    where: str,
    *,
    format_name: str,
    read: Collection[str],
    chosen: bool = False,
    texts: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the keys of a sample that are not read and are harmless.

    Args:
        format_name: the name of the sample's format.
        read: the keys that are read in this format.
        chosen: the user named the format, so texts of other formats are known to be unwanted.
        texts: the sample's texts that are read; another key may repeat one of them. None: not known yet, so keys of texts are
            not checked.

    Raises:
        DataError: a key that changes what should be trained on.
    """
    unread = []
    for key, value in sample.items():
        if key in read or is_empty(value):
            continue
        meaning = meaning_of(key, format_name)
        if texts is None and meaning in (OTHER_TEXT, SYSTEM_TEXT, THOUGHTS):
            continue
        if meaning and not _is_redundant(key, value, meaning, texts or (), chosen):
            remedy = _REMEDY.get(meaning) or (
                f"Give --data_format {format_name} to train on the other texts alone, or remove the key."
            )
            raise DataError(
                f"{where}: `{excerpt(key)}` is not read in the format {format_name}: it is {meaning}. {remedy}",
                code="data.key_of_another_format",
            )
        unread.append(key)
    return tuple(unread)


def _is_redundant(key: str, value: Any, meaning: str, texts: Sequence[str], chosen: bool) -> bool:
    """Whether a key with a meaning adds nothing to what the sample's texts, or the user's options, already say."""
    if meaning == OTHER_TEXT and (chosen or (isinstance(value, str) and renders(value, texts))):
        return True
    if meaning in (OTHER_TEXT, SYSTEM_TEXT):
        return isinstance(value, str) and value.strip() in {text.strip() for text in texts}
    if meaning == THOUGHTS:
        return isinstance(value, bool | int | float) or (
            isinstance(value, str) and any(value.strip() in text for text in texts)
        )
    return meaning in (MASK, RATING) and selects_default(key, value)


def renders(text: str, texts: Sequence[str]) -> bool:
    """Whether `text` contains each paragraph of all `texts` in order, as Alpaca's `text` contains the rest of the sample."""
    position = 0
    for paragraph in (part.strip() for other in texts for part in other.split("\n\n")):
        start = text.find(paragraph, position)
        if start < 0:
            return False
        position = start + len(paragraph)
    return position > 0


def is_left_out_of_loss(turn: Mapping[str, Any], place: str, *, is_answer: bool) -> bool:
    """Whether an answer's marks leave it out of the loss: `train`, `loss`, `weight`, `loss_scale` and `mask`.

    Raises:
        DataError: a mark whose value is not a yes or no; marks that contradict each other; or a mark that asks to train on a
            turn that is not an answer.
    """
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


_MARKS = ("train", "loss", "weight", "loss_scale", "mask")


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


def check_turn_keys(turn: Mapping[str, Any], place: str, *, names: Collection[str]) -> tuple[str, ...]:
    """Return the keys of a turn that are not read and are harmless; `names` are the keys of its role and its text.

    Raises:
        DataError: an unknown key, or one that changes what should be trained on.
    """
    if len(turn) == len(names) and all(name in turn for name in names):
        return ()
    notes = []
    for key, value in turn.items():
        if key in names or key in _MARKS or is_empty(value):
            continue
        if key in HARMLESS_OF_TURNS:
            notes.append(key)
            continue
        raise DataError(f"{place}: {_why_refused(excerpt(key), meaning_of(key, 'messages'))}", code="data.key_refused")
    return tuple(notes)


def _why_refused(key: str, meaning: str | None) -> str:
    if key in _THOUGHTS:
        return f"`{key}` is not rendered. Write it at the beginning of the text, between <think> and </think>."
    if key in _UNRENDERED:
        return f"`{key}` is not rendered. Write it into the text, as the model writes it."
    if meaning == MASK:
        return f'`{key}` is not read in a turn: it is {meaning}. Use "train": true or false instead, or remove it.'
    if meaning:
        return f"`{key}` is not read in a turn: it is {meaning}. Write it into the text, or remove it."
    return (
        f"unknown key `{key}` in a turn; it might select what is trained on. Remove it. Known keys are "
        f"{', '.join(_MARKS)}, and notes such as id and timestamp."
    )
