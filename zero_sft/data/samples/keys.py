"""Check the keys of a sample: each is read, refused, or reported in the log as not read. Pure.

Other tools use keys that this one does not read: masks, marks of bad answers, images, a second text. Training on a sample that
uses one of them would go wrong, so the sample is refused. An unknown key of a sample is taken for a note by the author of the
data, and counted.

A value without effect passes: null, an empty text or list, or a mark that selects what is trained on anyway. Arrow gives every
row all keys, so most samples of a Parquet file have such values.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zero_sft.data.samples.key_meanings import Meaning, is_empty, meaning_of, selects_default
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

_REMEDY = {
    Meaning.MASK: 'Mark turns with "train": false instead, or remove the key.',
    Meaning.RATING: "Leave out the samples with bad answers, and remove the key.",
    Meaning.TOKENS: "Remove the key.",
    Meaning.MEDIA: "Remove the sample, or only the key if the texts don't need it.",
    Meaning.SYSTEM_TEXT: "Make it the first turn, with the role system, or remove the key.",
    Meaning.THOUGHTS: "Put the thoughts into the answer: at its beginning, between <think> and </think>, or as "
    "`reasoning_content` next to its text. Or remove the key.",
    Meaning.TOOLS: "Write it into the texts, into `tools` or into `chat_template_kwargs`, or remove the key.",
}


def check_keys(
    sample: Mapping[str, Any],
    where: str,
    *,
    format_name: str,
    read: Collection[str],
    is_chosen: bool,
    texts: Sequence[str] | None,
) -> tuple[str, ...]:
    """Return the keys of a sample that are not read and are harmless.

    Args:
        read: the keys that are read in this format.
        is_chosen: the user named the format, so texts of other formats are known to be unwanted.
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
        if texts is None and meaning in (Meaning.OTHER_TEXT, Meaning.SYSTEM_TEXT, Meaning.THOUGHTS):
            continue
        if meaning and not _is_redundant(key, value, meaning, texts or (), is_chosen):
            remedy = _REMEDY.get(meaning) or (
                f"Give --data_format {format_name} to train on the other texts alone, or remove the key."
            )
            raise DataError(
                f"{where}: `{excerpt(key)}` is not read in the format {format_name}: it is {meaning}. {remedy}",
                code="data.key_of_another_format",
            )
        unread.append(key)
    return tuple(unread)


def _is_redundant(key: str, value: Any, meaning: Meaning, texts: Sequence[str], is_chosen: bool) -> bool:
    """Whether a key with a meaning adds nothing to what the sample's texts, or the user's options, already say."""
    if meaning == Meaning.OTHER_TEXT and (is_chosen or (isinstance(value, str) and contains_texts(value, texts))):
        return True
    if meaning in (Meaning.OTHER_TEXT, Meaning.SYSTEM_TEXT):
        return isinstance(value, str) and value.strip() in {text.strip() for text in texts}
    if meaning == Meaning.THOUGHTS:
        return isinstance(value, bool | int | float) or (
            isinstance(value, str) and any(value.strip() in text for text in texts)
        )
    return meaning in (Meaning.MASK, Meaning.RATING) and selects_default(key, value)


def contains_texts(text: str, texts: Sequence[str]) -> bool:
    """Whether `text` contains each paragraph of all `texts` in order, as Alpaca's `text` contains the rest of the sample."""
    position = 0
    for paragraph in (part.strip() for other in texts for part in other.split("\n\n")):
        start = text.find(paragraph, position)
        if start < 0:
            return False
        position = start + len(paragraph)
    return position > 0
