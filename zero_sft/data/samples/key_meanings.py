"""The meaning that a key of a sample has for other tools, told by its name, and whether its value asks for anything. Pure.

A name is read by its words, in snake_case and camelCase, since no list has every `skip_train`, `tokenWeights` and `sysPrompt`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

_NOTHING_IN_WORDS = ("", "[]", "{}", "null", "none")
_YES, _NO = ("true", "1", "1.0"), ("false", "0", "0.0")

# What each group of keys means, as the end of "`key` is not read: it is ...".
MASK = "a mark of what is trained on"
RATING = "a mark of good and bad answers (KTO), and every answer is trained on here"
TOKENS = "a column of tokenised data, and the texts are tokenised here"
MEDIA = "something other than text, and text alone is trained on"
SYSTEM_TEXT = "a system text"
THOUGHTS = "the thoughts of an answer"
TOOLS = "a part of the conversation"
OTHER_TEXT = "another text"


def names(text: str) -> frozenset[str]:
    """Several names or words, written as one text."""
    return frozenset(text.split())


_CLASSES = names("label kto_tag")
"""Ratings that may be a class of a plain text."""
_MEANING: Mapping[str, str] = {
    **dict.fromkeys(names("train_detail"), MASK),
    **dict.fromkeys((*_CLASSES, *names("accepted is_accepted approved is_approved")), RATING),
    **dict.fromkeys(names("input_ids labels attention_mask completion_mask assistant_masks assistant_mask"), TOKENS),
    **dict.fromkeys(names("objects bbox"), MEDIA),
    **dict.fromkeys(names("instructions"), SYSTEM_TEXT),
    **dict.fromkeys(
        names("history chat_template_kwargs documents enable_thinking thinking_budget reasoning_effort model_identity"), TOOLS
    ),
    **dict.fromkeys(
        names(
            "conversations conversation messages instruction input output prompt completion text query response chosen "
            "rejected chosen_response rejected_response rejected_messages preferred dispreferred"
        ),
        OTHER_TEXT,
    ),
}
_TEXTS_OF_ONE_QUESTION = names("question answer context suffix")
_WORDS_OF: Mapping[str, frozenset[str]] = {
    MASK: names(
        "mask masks masked masking unmask unmasked loss losses train trains trained training trainable untrained untrainable "
        "weight weights weighted weighting ignore ignored ignores skip skipped skips exclude excluded excludes omit omitted "
        "drop dropped discard discarded"
    ),
    RATING: names("reject rejected rejects rejection desirable undesirable dispreferred kto"),
    MEDIA: names(
        "image images img imgs picture pictures pic pics photo photos screenshot screenshots pixel pixels video "
        "videos audio audios"
    ),
    THOUGHTS: names("reasoning thinking thought thoughts cot"),
    TOOLS: names("tool tools toolset toolsets function functions"),
}
_SYSTEM = names("system sys preamble")
_TEXT = names("prompt prompts text texts message messages msg instruction instructions content")
_COUNTS = names("num count n id ids name names total")
"""Words that make a key a note about a thing: `num_images`. Not about a mask, which may be a list of numbers."""
_ABOUT = names("model type source score length tokens level category language difficulty quality format")
"""Words that make a key a note about an answer, thoughts or tools; not about images: an `image_source` may be the image."""
_NOTES = names("skip_prompt_formatting")
"""Notes of well-known datasets (OpenHermes 2.5) that would be taken for marks."""

_AMBIGUOUS_WITH_MASK = names("loss losses train trains trained training trainable weight weights")
_OPPOSITES = names(
    "no not non dont never mask masks masked masking untrained untrainable ignore ignored ignores skip skipped skips exclude "
    "excluded excludes omit omitted drop dropped discard discarded reject rejected rejects rejection undesirable dispreferred"
)
"""Words that turn the meaning of true into "do not train"."""
_PROMPTS = names("input inputs prompt prompts")
_NEUTRAL = names(
    "is are was has do does should be to for from of in on the this use used sample example row item answer answers scale"
)


def words_of(key: str) -> list[str]:
    """Worked example: "isMasked" → is, masked; "loss_weight2" → loss, weight."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key)
    return re.findall(r"[a-z]+", apart.lower())


@functools.lru_cache(maxsize=10_000)  # most samples have the same keys
def meaning_of(key: str, layout: str) -> str | None:
    """The meaning that a key has for other tools, next to a sample of that layout; None: a note."""
    name, words = key.strip().lower(), words_of(key)
    name = "_".join(words) if "_".join(words) in _MEANING else name
    if name in _NOTES or (layout == "text" and name in _CLASSES):
        return None
    if layout in ("alpaca", "prompt_completion") and name in _TEXTS_OF_ONE_QUESTION:
        return OTHER_TEXT
    meaning = _MEANING.get(name) or _meaning_of_words(words)
    # plain text is whole: it was made of them
    return None if layout == "text" and meaning in (SYSTEM_TEXT, THOUGHTS, TOOLS) else meaning


def _meaning_of_words(words: list[str]) -> str | None:
    known = frozenset(words)
    if known & _WORDS_OF[MASK]:
        return None if words[-1] in ("id", "name") else MASK
    if known & _WORDS_OF[RATING] and not known & _ABOUT:
        return RATING
    if known & _COUNTS:
        return None
    if known & _WORDS_OF[MEDIA]:
        return MEDIA
    if known & _ABOUT:
        return None
    if (known & _SYSTEM and (known <= _SYSTEM or known & _TEXT)) or ("developer" in known and known & _TEXT):
        return SYSTEM_TEXT
    return next((meaning for meaning in (THOUGHTS, TOOLS) if known & _WORDS_OF[meaning]), None)


def asks_for_nothing(value: Any) -> bool:
    """True if a value says no more than an absent key does: it is null, empty, or holds only such values."""
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING_IN_WORDS
    if isinstance(value, Mapping):
        return all(map(asks_for_nothing, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(asks_for_nothing, value)))


def as_flag(value: Any) -> bool | None:
    """True or False, also where it is written as a number or as text; None for anything else."""
    text = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    return True if text in _YES else False if text in _NO else None


def asks_for_the_usual(key: str, value: Any) -> bool:
    """True if a mark certainly says that the answers, and nothing else, are trained on.

    Only where every word of its name is known: `train_on_last` is not. 1 in a mask may mean that a text is trained on, or that
    it is not; so may `loss_mask`.

    Worked example: weight 1, is_train true, no_loss false, train_on_inputs false → True; no_loss true, loss_mask false → False.
    """
    words = frozenset(words_of(key))
    marks = _WORDS_OF[MASK] | _WORDS_OF[RATING] | names("label kto tag accepted approved")
    flag = as_flag(value)
    if flag is None or not words <= marks | _OPPOSITES | _PROMPTS | _NEUTRAL:
        return False
    is_number = str(value).strip().lower() not in ("true", "false")
    if any("mask" in word for word in words) and (is_number or words & _AMBIGUOUS_WITH_MASK):
        return False
    is_opposite = (len(words & _OPPOSITES) + bool(words & _PROMPTS)) % 2 == 1
    return flag is not is_opposite
