"""The keys of a sample and of its turns: each is read, refused, or named in the log as not read. Pure.

Other tools give a meaning to keys that this one does not read: what is masked, which answer is the bad one, images, a second
text. A sample that uses one of them would be trained on wrongly, so it is refused. A key of a sample that no tool knows is
taken for a note of whoever made the data, and counted. A turn has few such notes (`HARMLESS_OF_TURNS`), so any other unknown
key of a turn is refused.

A value that asks for nothing passes: null, an empty text or list, and a mark that says that the text is trained on. Arrow
gives every row all keys, so most samples of a Parquet file have such values.
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
    asks_for_nothing,
    asks_for_the_usual,
    meaning_of,
    names,
)
from zero_sft.errors import DataError
from zero_sft.printable import on_one_line

_REMEDY = {
    MASK: 'Mark the turns, with "train": false, or remove it.',
    RATING: "Leave out the samples with bad answers, and remove the key.",
    TOKENS: "Remove it.",
    MEDIA: "Remove the sample, or the key if the texts don't need it.",
    SYSTEM_TEXT: "Make it the first turn, of the role system, or remove it.",
    THOUGHTS: "Write them into the answer, at its beginning, between <think> and </think>, or remove the key.",
    TOOLS: "Write it into the texts, or remove it.",
}

HARMLESS_OF_TURNS = names(
    "id idx index uuid turn turn_id turn_identifier message_id parent_id timestamp create_time created_at date time language "
    "lang country header state hashed_ip user_id author avatar model source redacted toxic score rating category topic tags "
    "metadata num_tokens token_count tokens length"
)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_UNRENDERED = ("tool_calls", "function_call")


def unread_keys(
    sample: Mapping[str, Any],
    where: str,
    *,
    layout: str,
    read: Collection[str],
    chosen: bool = False,
    texts: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The keys of a sample that are not read, and do no harm.

    Args:
        layout: the name of the sample's layout, and `read` the keys that are read in it.
        chosen: the layout was asked for by name, so texts of other layouts are known not to be wanted.
        texts: those of the sample that are read; another key may repeat one of them. None: not known as yet, so keys that are
            texts are not looked at.

    Raises:
        DataError: a key that changes what is to be trained on.
    """
    unread = []
    for key, value in sample.items():
        if key in read or asks_for_nothing(value):
            continue
        meaning = meaning_of(key, layout)
        if texts is None and meaning in (OTHER_TEXT, SYSTEM_TEXT, THOUGHTS):
            continue
        if meaning and not _is_settled(key, value, meaning, texts or (), chosen):
            remedy = _REMEDY.get(meaning) or (
                f"Give --data_format {layout} if the rest is what is to be trained on, or remove it."
            )
            raise DataError(
                f"{where}: `{on_one_line(key)}` is not read in the format {layout}: it is {meaning}. {remedy}",
                code="data.key_of_another_format",
            )
        unread.append(key)
    return tuple(unread)


def _is_settled(key: str, value: Any, meaning: str, texts: Sequence[str], chosen: bool) -> bool:
    """Whether a key with a meaning says nothing that the sample, or the user, has not said."""
    if meaning == OTHER_TEXT and (chosen or (isinstance(value, str) and renders(value, texts))):
        return True
    if meaning in (OTHER_TEXT, SYSTEM_TEXT):
        return isinstance(value, str) and value.strip() in {text.strip() for text in texts}
    if meaning == THOUGHTS:
        return isinstance(value, bool | int | float) or (
            isinstance(value, str) and any(value.strip() in each for each in texts)
        )
    return meaning in (MASK, RATING) and asks_for_the_usual(key, value)


def renders(text: str, texts: Sequence[str]) -> bool:
    """Whether a text has each paragraph of all `texts` in it, in their order, as Alpaca's `text` has the rest of the sample."""
    place = 0
    for paragraph in (each.strip() for text in texts for each in text.split("\n\n")):
        found = text.find(paragraph, place)
        if found < 0:
            return False
        place = found + len(paragraph)
    return place > 0


def is_trained(turn: Mapping[str, Any], place: str, *, is_answer: bool) -> bool:
    """Whether a turn's own marks leave it trained on: `train`, `loss`, `weight`, `loss_scale` and `mask`.

    Raises:
        DataError: a mark with another value than yes or no; marks that contradict each other; or one that asks for more than an
            answer to be trained on.
    """
    verdicts = {key: _verdict(key, turn[key], place) for key in _MARKS if key in turn and not asks_for_nothing(turn[key])}
    if not is_answer:
        for key in ("train", "loss", "loss_scale"):
            if verdicts.get(key):
                raise DataError(
                    f'{place}: "{key}": {on_one_line(repr(turn[key]))} asks for this turn to be trained on, and only answers '
                    "are. Remove it.",
                    code="data.only_answers_are_trained_on",
                )
        return False
    if len(set(verdicts.values())) > 1:
        given = " and ".join(f'"{key}": {on_one_line(repr(turn[key]))}' for key in verdicts)
        raise DataError(f"{place}: {given} contradict each other. Give one.", code="data.contradicting_keys")
    return all(verdicts.values())


_MARKS = ("train", "loss", "weight", "loss_scale", "mask")


def _verdict(key: str, value: Any, place: str) -> bool:
    """Whether the turn is trained on, as one of its marks says."""
    flag = as_flag(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if flag is None or (key == "mask" and is_number):  # 1 in a mask may mean that a text is trained on, or that it is not
        expected = "0 or 1" if key in ("weight", "loss_scale") else "true or false"
        raise DataError(
            f'{place}: "{key}": {on_one_line(repr(value))}; expected {expected}. "train": false leaves '
            "an answer out of the loss.",
            code="data.bad_value_of_key",
        )
    return flag != (key == "mask")


def require_known_turn(turn: Mapping[str, Any], place: str, *, names: Collection[str]) -> tuple[str, ...]:
    """The keys of a turn that are not read, and do no harm; `names` are those of its role and its text.

    Raises:
        DataError: a key that changes what is to be trained on, or that is not known.
    """
    if len(turn) == len(names) and all(name in turn for name in names):
        return ()
    notes = []
    for key, value in turn.items():
        if key in names or key in _MARKS or asks_for_nothing(value):
            continue
        if key in HARMLESS_OF_TURNS:
            notes.append(key)
            continue
        raise DataError(f"{place}: {_why_refused(on_one_line(key), meaning_of(key, 'messages'))}", code="data.key_refused")
    return tuple(notes)


def _why_refused(key: str, meaning: str | None) -> str:
    if key in _THOUGHTS:
        return f"`{key}` is not rendered. Write it into the text, at its beginning, between <think> and </think>."
    if key in _UNRENDERED:
        return f"`{key}` is not rendered. Write it into the text, as the model writes it."
    if meaning == MASK:
        return f'`{key}` is not read in a turn: it is {meaning}. Give "train": true or false instead, or remove it.'
    if meaning:
        return f"`{key}` is not read in a turn: it is {meaning}. Write it into the text, or remove it."
    return (
        f"`{key}` is not a known key of a turn, so it may say what is to be trained on. Remove it. Known are "
        f"{', '.join(_MARKS)}, and notes such as id and timestamp."
    )
