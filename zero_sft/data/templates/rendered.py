"""A sample as text, and which characters of it are trained on. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A sample as text; `spans` are the half-open ranges of characters to train on, in order.

    `adds_special_tokens`: whether the tokenizer is to add its own, since the text has none. `ends`: the turn of each answer
    with a text, and where it ends. `thoughts`: how many answers have some, `dropped_thoughts`: how many of these are without
    theirs in the text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str
    adds_special_tokens: bool
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0
