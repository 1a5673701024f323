"""The keys of a sample and of its turns: each is read, refused, or named in the log as not read. Pure.

Other tools give a meaning to keys that this one does not read: what is masked, which answer is the bad one, images, a second
text. A sample that uses one of them would be trained on wrongly, so it is refused. A key of a sample that no tool knows is
taken for a note of whoever made the data, and counted. A turn has few such notes (`HARMLESS_OF_TURNS`), so any other unknown
key of a turn is refused.

A value that asks for nothing passes: null, an empty text or list, and a mark that says that the text is trained on. Arrow
gives every row all keys, so most samples of a Parquet file have such values.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zero_sft.errors import DataError

_NOTHING_IN_WORDS = ("", "[]", "{}", "null", "none")
_YES, _NO = ("true", "1", "1.0"), ("false", "0", "0.0")

# What each group of keys means, as the end of "`key` is not read: it is ...".
_MASK = "a mark of what is trained on"
_RATING = "a mark of good and bad answers (KTO), and every answer is trained on here"
_TOKENS = "a column of tokenised data, and the texts are tokenised here"
_MEDIA = "something other than text, and text alone is trained on"
_SYSTEM = "a system text"
_TOOLS = "a part of the conversation"
_OTHER_TEXT = "another text"

_REMEDY = {
    _MASK: 'Mark the turns, with "train": false, or remove it.',
    _RATING: "Leave out the samples with bad answers, and remove the key.",
    _TOKENS: "Remove it.",
    _MEDIA: "Remove the sample, or the key if the texts don't need it.",
    _SYSTEM: "Make it the first turn, of the role system, or remove it.",
    _TOOLS: "Write it into the texts, or remove it.",
}


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


_MASKS = _keys("train train_detail trainable training loss loss_mask loss_scale loss_weight weight weights mask masks")
_RATINGS = _keys("label kto_tag")
_MEANING: Mapping[str, str] = {
    **dict.fromkeys(_MASKS, _MASK),
    **dict.fromkeys(_RATINGS, _RATING),
    **dict.fromkeys(_keys("input_ids labels attention_mask completion_mask assistant_masks assistant_mask"), _TOKENS),
    **dict.fromkeys(_keys("image images video videos audio audios objects bbox pixel_values"), _MEDIA),
    **dict.fromkeys(_keys("system system_prompt system_message"), _SYSTEM),
    **dict.fromkeys(_keys("tools functions history chat_template_kwargs tool_calls function_call"), _TOOLS),
}
_OTHER_TEXTS = _keys(
    "conversations conversation messages instruction input output prompt completion text query response chosen rejected "
    "chosen_response rejected_response rejected_messages"
)
_TEXTS_OF_ONE_QUESTION = _keys("question answer context")
_WORDS_OF = {
    _MASK: _keys("mask masks masked loss train trained trainable"),
    _MEDIA: _keys("image images video videos audio audios"),
    _TOOLS: _keys("tool tools function functions"),
}
"""Words in a key that nobody knows, such as `loss_mask_of_answer`, that make it one of a group."""
_COUNTS = _keys("num count n id ids name names total")
"""Words in a key that make it a note about such a thing: `num_images`."""

HARMLESS_OF_TURNS = _keys(
    "id idx index uuid turn turn_id turn_identifier message_id parent_id timestamp create_time created_at date time language "
    "lang country header state hashed_ip user_id author avatar model source redacted toxic score rating category topic tags "
    "metadata num_tokens token_count tokens length"
)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_UNRENDERED = ("tool_calls", "function_call")


def asks_for_nothing(value: Any) -> bool:
    """Whether a value says no more than a key that is not there: null, empty, or only of such values."""
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING_IN_WORDS
    if isinstance(value, Mapping):
        return all(map(asks_for_nothing, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(asks_for_nothing, value)))


def as_flag(value: Any) -> bool | None:
    """True or False, also where it is written as a number or as text; None for anything else."""
    text = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    return True if text in _YES else False if text in _NO else None


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
        meaning = _meaning(key, layout)
        if texts is None and meaning in (_OTHER_TEXT, _SYSTEM):
            continue
        if meaning and not _is_settled(key, value, meaning, texts or (), chosen):
            remedy = _REMEDY.get(meaning) or (
                f"Give --data_format {layout} if the rest is what is to be trained on, or remove it."
            )
            raise DataError(
                f"{where}: `{key}` is not read in the format {layout}: it is {meaning}. {remedy}",
                code="data.key_of_another_format",
            )
        unread.append(key)
    return tuple(unread)


def _meaning(key: str, layout: str) -> str | None:
    """The meaning that a key has for other tools, next to a sample of that layout; None: a note."""
    name = key.strip().lower()
    if layout == "text" and (name in _RATINGS or _MEANING.get(name) in (_SYSTEM, _TOOLS)):
        return None  # the text is whole: a class of it, or what it was made of
    if name in _MEANING:
        return _MEANING[name]
    if name in _OTHER_TEXTS or (layout in ("alpaca", "prompt_completion") and name in _TEXTS_OF_ONE_QUESTION):
        return _OTHER_TEXT
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()))
    if words & _COUNTS:
        return None
    return next((meaning for meaning, known in _WORDS_OF.items() if words & known), None)


def _is_settled(key: str, value: Any, meaning: str, texts: Sequence[str], chosen: bool) -> bool:
    """Whether a key with a meaning says nothing that the sample, or the user, has not said."""
    if meaning == _OTHER_TEXT and chosen:
        return True
    if meaning == _OTHER_TEXT and isinstance(value, str) and renders(value, texts):
        return True
    if meaning in (_OTHER_TEXT, _SYSTEM):
        return isinstance(value, str) and value.strip() in {text.strip() for text in texts}
    if meaning in (_MASK, _RATING):
        return str(value).strip().lower() == "false" if "mask" in key.lower() else as_flag(value) is True
    return False


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
                    f'{place}: "{key}": {turn[key]!r} asks for this turn to be trained on, and only answers are. Remove it.',
                    code="data.only_answers_are_trained_on",
                )
        return False
    if len(set(verdicts.values())) > 1:
        given = " and ".join(f'"{key}": {turn[key]!r}' for key in verdicts)
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
            f'{place}: "{key}": {value!r}; expected {expected}. "train": false leaves an answer out of the loss.',
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
        raise DataError(f"{place}: {_why_refused(key)}", code="data.key_refused")
    return tuple(notes)


def _why_refused(key: str) -> str:
    if key in _THOUGHTS:
        return f"`{key}` is not rendered. Write it into the text, at its beginning, between <think> and </think>."
    if key in _UNRENDERED:
        return f"`{key}` is not rendered. Write it into the text, as the model writes it."
    meaning = _meaning(key, "messages")
    if meaning == _MASK:
        return f'`{key}` is not read in a turn: it is {meaning}. Give "train": true or false instead, or remove it.'
    if meaning:
        return f"`{key}` is not read in a turn: it is {meaning}. Write it into the text, or remove it."
    return (
        f"`{key}` is not a known key of a turn, so it may say what is to be trained on. Remove it. Known are "
        f"{', '.join(_MARKS)}, and notes such as id and timestamp."
    )
