"""Turn text into token ids and labels; a token is trained on if its characters belong to an answer.

The whole text is tokenised once, as at inference, and the character offsets show which tokens overlap an answer. Tokenising
the parts separately and adding up their lengths was left out: it goes wrong wherever a tokenizer joins characters across a
border. Works with every fast tokenizer; in transformers 5 all tokenizers are fast.
"""

import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from zero_sft.data.samples.conversation import IGNORE_INDEX
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.errors import DataError

CharsOf = Callable[[int], tuple[int, int] | None]
"""Returns a token's half-open range of characters; None for a special token that the tokenizer adds."""

WEIGHTS = "weights"
"""The column with the weights of a row's tokens in the loss: null for a sample whose trained tokens all weigh 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSample:
    """One sample as tokens. `labels[i]` is `input_ids[i]` for the `trained_tokens` tokens to train on, else -100.

    `weights` are those of the tokens in the loss; None if all that are trained on weigh 1.

    `cut_tokens` counts the tokens truncated beyond `model_max_length`, and `cut_trained_tokens` those of them that would have
    been trained on. `thoughts` and `dropped_thoughts` are as in `RenderedText`. `ends` is set only for truncated samples: for
    each answer, the index of its turn and the number of tokens up to its end.
    """

    input_ids: list[int]
    labels: list[int]
    trained_tokens: int
    cut_tokens: int = 0
    cut_trained_tokens: int = 0
    thoughts: int = 0
    dropped_thoughts: int = 0
    ends: tuple[tuple[int, int], ...] = ()
    weights: list[float] | None = None

    @property
    def full_length(self) -> int:
        """The length in tokens before truncation."""
        return len(self.input_ids) + self.cut_tokens


def tokenize_rendered(
    rendered: Sequence[RenderedText], tokenizer: PreTrainedTokenizerBase, model_max_length: int
) -> list[TokenizedSample]:
    """Tokenise and label texts, truncated at the end to `model_max_length` tokens.

    Raises:
        DataError: a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not map tokens to characters, so the assistant's text can't be located; expected "
            "a fast tokenizer. Convert the model's tokenizer to a tokenizer.json.",
            code="data.tokenizer_without_offsets",
        )
    added_ids = frozenset(tokenizer.added_tokens_decoder)
    samples: dict[int, TokenizedSample] = {}
    for adds_special_tokens in (True, False):
        indices = [index for index, text in enumerate(rendered) if text.adds_special_tokens == adds_special_tokens]
        if not indices:
            continue
        encoded = tokenizer(
            [rendered[index].text for index in indices],
            add_special_tokens=adds_special_tokens,
            return_attention_mask=False,
            verbose=False,  # no warnings for texts longer than the model's limit: they are truncated and counted
        )
        for index, ids, encoding in zip(indices, encoded["input_ids"], encoded.encodings or (), strict=True):
            chars_of = encoding.token_to_chars
            while ids and chars_of(len(ids) - 1) is None:  # a special token added at the end; the text already has its end
                ids.pop()
            ranges, start = [], 0
            spans = rendered[index].spans
            for span, whole in zip(spans, rendered[index].whole_tokens or (False,) * len(spans), strict=True):
                ranges.append(_trained_range(chars_of, ids, span, added_ids, start, whole=whole))
                start = ranges[-1][1]
            samples[index] = _label(ids, ranges, model_max_length, rendered[index])
            if len(ids) > model_max_length:
                samples[index] = replace(samples[index], ends=_token_ends(chars_of, len(ids), rendered[index].ends))
    return [samples[index] for index in range(len(rendered))]


def label_ids(ids: Sequence[int], labels: Sequence[int], weight: float, model_max_length: int) -> TokenizedSample:
    """Return a sample that is tokenised already, truncated at the end to `model_max_length` tokens."""
    labels = [IGNORE_INDEX, *labels[1:]]  # the first token has no context to be predicted from
    kept, cut = labels[:model_max_length], labels[model_max_length:]
    return TokenizedSample(
        input_ids=list(ids[:model_max_length]),
        labels=kept,
        trained_tokens=len(kept) - kept.count(IGNORE_INDEX),
        cut_tokens=len(cut),
        cut_trained_tokens=len(cut) - cut.count(IGNORE_INDEX),
        weights=None if weight == 1 else [weight * (label != IGNORE_INDEX) for label in kept],
    )


def token_range(chars_of: CharsOf, count: int, span: tuple[int, int], start: int = 0) -> tuple[int, int]:
    """Find the half-open range of the tokens whose characters overlap a span.

    A token with an empty range of characters (a word-start mark before a character that is split into bytes) counts by its
    position. Special tokens that the tokenizer adds are at the ends.

    Args:
        count: the number of tokens, which are in the order of the text.
        start: a token that is not past the range. The closer it is, the fewer tokens are examined.

    Worked example: characters (0,0) (0,4) (4,6) (6,6) (6,7), span [5,7) → [2, 5).
    """

    def reaches(token: int) -> bool:
        chars = chars_of(token)
        return chars is not None and (chars[1] > span[0] or chars[0] == chars[1] >= span[0])

    def is_past(token: int) -> bool:
        chars = chars_of(token)
        return chars is None or chars[0] >= span[1]

    low, high = start, count
    while low < high and chars_of(low) is None:
        low += 1
    while high > low and chars_of(high - 1) is None:
        high -= 1
    first = _first(reaches, low, high)
    return first, _first(is_past, first, high)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Find the first number in [low, high) for which a monotone predicate holds; `high` if there is none.

    An exponential search, so the cost depends on the distance from `low`, not on the size of the range.
    """
    step = 1
    while low + step < high and not holds(low + step - 1):
        low, step = low + step, 2 * step
    return low + bisect.bisect_left(range(low, min(low + step, high)), True, key=holds)


def _token_ends(chars_of: CharsOf, count: int, ends: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Convert the ends of turns from characters to numbers of tokens."""
    token_ends, start = [], 0
    for turn, char_end in ends:
        _, start = token_range(chars_of, count, (char_end - 1, char_end), start)
        token_ends.append((turn, start))
    return tuple(token_ends)


def _trained_range(
    chars_of: CharsOf, ids: Sequence[int], span: tuple[int, int], added_ids: Collection[int], start: int, *, whole: bool
) -> tuple[int, int]:
    """Find the tokens of a span, without an added token that begins before the span; with `whole`, without any other such.

    Some added tokens, such as Phi-3's header, include the white space after them and so overlap the span.
    """
    first, stop = token_range(chars_of, len(ids), span, max(0, start - 1))
    if whole:
        while first < stop and (chars_of(first) or span)[0] < span[0]:
            first += 1
        while first < stop and (chars_of(stop - 1) or span)[1] > span[1]:
            stop -= 1
    while first < stop and (chars_of(first) or span)[0] < span[0] and ids[first] in added_ids:
        first += 1
    return first, stop


def _label(ids: list[int], ranges: Sequence[tuple[int, int]], model_max_length: int, rendered: RenderedText) -> TokenizedSample:
    labels = [IGNORE_INDEX] * len(ids)
    for first, stop in ranges:
        start = max(first, 1)  # the first token has no context to be predicted from
        labels[start:stop] = ids[start:stop]
    weights = [0.0] * len(ids) if any(weight != 1 for weight in rendered.weights) else None
    for (first, stop), weight in zip(ranges, rendered.weights, strict=False):
        if weights is not None:
            weights[max(first, 1) : stop] = [weight] * (stop - max(first, 1))
    kept, cut = labels[:model_max_length], labels[model_max_length:]
    return TokenizedSample(
        input_ids=ids[:model_max_length],
        labels=kept,
        trained_tokens=len(kept) - kept.count(IGNORE_INDEX),
        cut_tokens=len(cut),
        cut_trained_tokens=len(cut) - cut.count(IGNORE_INDEX),
        thoughts=rendered.thoughts,
        dropped_thoughts=rendered.dropped_thoughts,
        weights=weights and weights[:model_max_length],
    )
