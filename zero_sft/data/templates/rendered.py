"""A sample as text, and the ranges of characters to train on. Plain data."""

from dataclasses import dataclass

Span = tuple[int, int]
"""A half-open range of characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A sample as text; `spans` are to be trained on, in order.

    `adds_special_tokens`: the tokenizer should add its special tokens, since the text has none. `ends`: for each answer with a
    text, the index of its turn and the character at which it ends. `thoughts` counts the answers with thoughts, and
    `dropped_thoughts` those of them whose thoughts the template leaves out.
    """

    text: str
    spans: tuple[Span, ...] = ()
    adds_special_tokens: bool = False
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0
