"""A sample as text, and the ranges of characters to train on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import Turn

Span = tuple[int, int]
"""A half-open range of characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A sample as text; `spans` are to be trained on, in order.

    `weights` are those of the spans, above 0 and up to 1; `whole_tokens` says for each span whether tokens that it holds only
    in part are left out. Both are empty if all spans are ordinary.

    `adds_special_tokens`: the tokenizer should add its special tokens, since the text has none. `ends`: for each answer with a
    text, the index of its turn and the character at which it ends. `thoughts` counts the answers with thoughts, and
    `dropped_thoughts` those of them whose thoughts the template leaves out.
    """

    text: str
    spans: tuple[Span, ...] = ()
    weights: tuple[float, ...] = ()
    whole_tokens: tuple[bool, ...] = ()
    adds_special_tokens: bool = False
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSpans:
    """The fields `spans`, `weights` and `whole_tokens` of a `RenderedText`."""

    spans: tuple[Span, ...] = ()
    weights: tuple[float, ...] = ()
    whole_tokens: tuple[bool, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `RenderedText`."""
        is_ordinary = all(weight == 1 for weight in self.weights) and not any(self.whole_tokens)
        return {"spans": self.spans} | ({} if is_ordinary else {"weights": self.weights, "whole_tokens": self.whole_tokens})

    def with_answer(self, turn: Turn, spans: Sequence[Span], body: Span | None, text: str, weight: float) -> "TrainedSpans":
        """Add an answer, unless it is left out of the loss.

        Args:
            spans: what is trained on of the whole answer.
            body: the place of the answer's text in the rendered `text`; needed if only ranges of it are trained on.
            weight: the sample's weight.
        """
        if turn.left_out_of_loss or weight == 0:
            return self
        is_partial = turn.trained_ranges is not None
        added = _ranges_of(turn, spans, body, text) if is_partial and body else list(spans)
        return TrainedSpans(
            spans=(*self.spans, *added),
            weights=(*self.weights, *[turn.weight * weight] * len(added)),
            whole_tokens=(*self.whole_tokens, *[is_partial] * len(added)),
        )


def _ranges_of(turn: Turn, spans: Sequence[Span], body: Span, text: str) -> list[Span]:
    """Return the trained ranges of an answer's text in the rendered text, and what follows the text: the end of the turn.

    The template may have stripped white space from the answer's text.
    """
    start, stop = body
    shift = start - max(0, turn.text.find(text[start:stop]))
    ranges = [(max(first + shift, start), min(last + shift, stop)) for first, last in turn.trained_ranges or ()]
    ranges = [(first, last) for first, last in ranges if first < last]
    end = max(span[1] for span in spans)
    if ranges and end > stop:
        ranges.append((stop, end))
    return ranges
