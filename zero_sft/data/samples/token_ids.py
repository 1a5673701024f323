"""Samples that are tokenised already: `input_ids` with `labels`, or with a mask of what is trained on. Pure.

Their ids are checked against the model's embedding, and their labels against their ids: labels that were shifted would train
every token to predict itself.
"""

from collections.abc import Mapping
from typing import Any

from zero_sft.data.samples.conversation import IGNORE_INDEX, TokenIds
from zero_sft.data.samples.key_meanings import is_empty
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
"""The keys of masks: 1 or true for a token that is trained on, 0 or false for others."""


def parse_token_ids(sample: Mapping[str, Any], where: str, weight: float) -> TokenIds:
    """Parse a sample with `input_ids`; without labels and masks, all is trained on.

    Raises:
        DataError: something else than whole numbers, other lengths, labels that are not those of the ids, or padding.
    """
    ids = _numbers(sample, "input_ids", where)
    given = [key for key in ("labels", *MASKS) if not is_empty(sample.get(key))]
    if len(given) > 1:
        raise DataError(
            f"{where}: `{given[0]}` and `{given[1]}` both say what is trained on. Keep one of them.", code="data.labels_twice"
        )
    labels = list(ids)
    for key in given:
        values = _numbers(sample, key, where, length=len(ids))
        is_mask = key != "labels"
        for position, (token_id, value) in enumerate(zip(ids, values, strict=True)):
            if value not in ((0, 1) if is_mask else (token_id, IGNORE_INDEX)):
                expected = "0 or 1" if is_mask else f"the token's id, {token_id}, or {IGNORE_INDEX}"
                raise DataError(
                    f"{where}: `{key}` has {value} at position {position}; expected {expected}. Don't shift labels: the model "
                    "does that.",
                    code="data.labels_are_not_the_ids",
                )
        labels = (
            [token_id if value else IGNORE_INDEX for token_id, value in zip(ids, values, strict=True)] if is_mask else values
        )
    if not is_empty(sample.get("attention_mask")) and 0 in _numbers(sample, "attention_mask", where, length=len(ids)):
        raise DataError(
            f"{where}: `attention_mask` hides tokens, such as padding. Leave the padding out: batches are padded here.",
            code="data.padded_tokens",
        )
    return TokenIds(input_ids=tuple(ids), labels=tuple(labels), where=where, weight=weight)


def _numbers(sample: Mapping[str, Any], key: str, where: str, length: int | None = None) -> list[int]:
    """Return a list of whole numbers, in a mask also true and false; raises `DataError`."""
    value, types = sample[key], (int, bool) if key in (*MASKS, "attention_mask") else (int,)
    if not isinstance(value, list) or not value or any(type(each) not in types for each in value):
        raise DataError(f"{where}: `{key}` must be a list of whole numbers; got {excerpt(value)}.", code="data.not_token_ids")
    if length is not None and len(value) != length:
        raise DataError(
            f"{where}: `{key}` has {len(value):,} values, but `input_ids` has {length:,}.", code="data.lengths_differ"
        )
    return [int(each) for each in value]
