"""Infer from a key's name its meaning in other tools, and from its value whether it has any effect. Pure.

Names are split into words, in snake_case and camelCase, since no list could hold every `skip_train`, `tokenWeights` and
`sysPrompt`.
"""

import functools
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

_EMPTY_TEXTS = ("", "[]", "{}", "null", "none")
_YES, _NO = ("true", "1", "1.0"), ("false", "0", "0.0")


class Meaning(StrEnum):
    """The meaning of a group of keys. Messages continue "`key` is not read in the format ...: it is " with it."""

    MASK = "a mark that selects what is trained on"
    RATING = "a mark of good and bad answers (KTO), but every answer is trained on here"
    TOKENS = "a column of tokenised data, but the texts are tokenised here"
    MEDIA = "something other than text, but only text is trained on"
    SYSTEM_TEXT = "a system text"
    THOUGHTS = "the thoughts of an answer"
    TOOLS = "a part of the conversation"
    OTHER_TEXT = "another text"


def word_set(text: str) -> frozenset[str]:
    """Split a text into its words, to write a set of names in one string."""
    return frozenset(text.split())


_CLASSES = word_set("label kto_tag")
"""Keys of ratings that, next to a plain text, may be its class instead."""
_NAMES_OF: Mapping[Meaning, frozenset[str]] = {
    Meaning.RATING: _CLASSES | word_set("accepted is_accepted approved is_approved"),
    Meaning.TOKENS: word_set("input_ids labels attention_mask completion_mask assistant_masks assistant_mask"),
    Meaning.MEDIA: word_set("objects bbox"),
    Meaning.SYSTEM_TEXT: word_set("instructions"),
    Meaning.TOOLS: word_set(
        "history chat_template_kwargs documents enable_thinking thinking_budget reasoning_effort model_identity"
    ),
    Meaning.OTHER_TEXT: word_set(
        "conversations conversation messages instruction input output prompt completion text query response chosen "
        "rejected chosen_response rejected_response rejected_messages preferred dispreferred"
    ),
}
_MEANING = {name: meaning for meaning, names in _NAMES_OF.items() for name in names}
_TEXTS_OF_ONE_QUESTION = word_set("question answer context suffix")
_WORDS_OF: Mapping[Meaning, frozenset[str]] = {
    Meaning.MASK: word_set(
        "mask masks masked masking unmask unmasked loss losses train trains trained training trainable untrained untrainable "
        "weight weights weighted weighting ignore ignored ignores skip skipped skips exclude excluded excludes omit omitted "
        "drop dropped discard discarded"
    ),
    Meaning.RATING: word_set("reject rejected rejects rejection desirable undesirable dispreferred kto"),
    Meaning.MEDIA: word_set(
        "image images img imgs picture pictures pic pics photo photos screenshot screenshots pixel pixels video "
        "videos audio audios"
    ),
    Meaning.THOUGHTS: word_set("reasoning thinking thought thoughts cot"),
    Meaning.TOOLS: word_set("tool tools toolset toolsets function functions"),
}
_SYSTEM = word_set("system sys preamble")
_TEXT = word_set("prompt prompts text texts message messages msg instruction instructions content")
_COUNTS = word_set("num count n id ids name names total")
"""Words that make a key a note, such as `num_images`. They don't do so for masks, which may be lists of numbers."""
_ABOUT = word_set("model type source score length tokens level category language difficulty quality format")
"""Words that make a key a note about an answer, thoughts or tools. Not for images: an `image_source` may be the image."""
_NOTES = word_set("skip_prompt_formatting parallel_tool_calls")
"""Notes in well-known datasets (OpenHermes 2.5) that would otherwise be taken for marks."""

_AMBIGUOUS_WITH_MASK = word_set("loss losses train trains trained training trainable weight weights")
_OPPOSITES = word_set(
    "no not non dont never mask masks masked masking untrained untrainable ignore ignored ignores skip skipped skips exclude "
    "excluded excludes omit omitted drop dropped discard discarded reject rejected rejects rejection undesirable dispreferred"
)
"""Words with which the value true means "do not train"."""
_PROMPTS = word_set("input inputs prompt prompts")
_NEUTRAL = word_set(
    "is are was has do does should be to for from of in on the this use used sample example row item answer answers scale"
)


def words_of(key: str) -> list[str]:
    """Split a key's name into lower-case words.

    Worked example: "isMasked" → is, masked; "loss_weight2" → loss, weight.
    """
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key)
    return re.findall(r"[a-z]+", snake_case.lower())


@functools.lru_cache(maxsize=10_000)  # most samples have the same keys
def meaning_of(key: str, format_name: str) -> Meaning | None:
    """Return the meaning that a key has for other tools in a sample of that format; None for a note."""
    name, words = key.strip().lower(), words_of(key)
    name = "_".join(words) if "_".join(words) in _MEANING else name
    if name in _NOTES or (format_name == "text" and name in _CLASSES):
        return None
    if format_name in ("alpaca", "prompt_completion") and name in _TEXTS_OF_ONE_QUESTION:
        return Meaning.OTHER_TEXT
    meaning = _MEANING.get(name) or _meaning_of_words(words)
    # plain text already contains these: it was rendered from them
    return None if format_name == "text" and meaning in (Meaning.SYSTEM_TEXT, Meaning.THOUGHTS, Meaning.TOOLS) else meaning


def _meaning_of_words(words: list[str]) -> Meaning | None:
    distinct = frozenset(words)
    if distinct & _WORDS_OF[Meaning.MASK]:
        return None if words[-1] in ("id", "name") else Meaning.MASK
    if distinct & _WORDS_OF[Meaning.RATING] and not distinct & _ABOUT:
        return Meaning.RATING
    if distinct & _COUNTS:
        return None
    if distinct & _WORDS_OF[Meaning.MEDIA]:
        return Meaning.MEDIA
    if distinct & _ABOUT:
        return None
    if (distinct & _SYSTEM and (distinct <= _SYSTEM or distinct & _TEXT)) or ("developer" in distinct and distinct & _TEXT):
        return Meaning.SYSTEM_TEXT
    return next((meaning for meaning in (Meaning.THOUGHTS, Meaning.TOOLS) if distinct & _WORDS_OF[meaning]), None)


def is_empty(value: Any) -> bool:
    """Whether a value means the same as an absent key: it is null, empty, or holds only such values."""
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def as_flag(value: Any) -> bool | None:
    """Read a bool, also if it is written as a number or as text; None for anything else."""
    text = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    return True if text in _YES else False if text in _NO else None


def selects_default(key: str, value: Any) -> bool:
    """Whether a mark certainly selects what is trained on anyway: the answers and nothing else.

    Every word of its name must be known, which rules out `train_on_last`. A number in a mask is ambiguous: 1 may mean
    "train on this" or "leave this out". So is a name such as `loss_mask`.

    Worked example: weight 1, is_train true, no_loss false, train_on_inputs false → True; no_loss true, loss_mask false → False.
    """
    words = frozenset(words_of(key))
    marks = _WORDS_OF[Meaning.MASK] | _WORDS_OF[Meaning.RATING] | word_set("label kto tag accepted approved")
    flag = as_flag(value)
    if flag is None or not words <= marks | _OPPOSITES | _PROMPTS | _NEUTRAL:
        return False
    is_number = str(value).strip().lower() not in ("true", "false")
    if any("mask" in word for word in words) and (is_number or words & _AMBIGUOUS_WITH_MASK):
        return False
    is_opposite = (len(words & _OPPOSITES) + bool(words & _PROMPTS)) % 2 == 1
    return flag is not is_opposite
