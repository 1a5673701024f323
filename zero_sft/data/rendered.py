"""A sample as text, and which characters of it are trained on. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A sample as text; `spans` are the half-open ranges of characters to train on, in order.

    `adds_special_tokens`: whether the tokenizer is to add its own, since the text has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str
    adds_special_tokens: bool
