"""From text to token ids and labels: a token is trained on where its characters belong to an answer.

The whole text is tokenised once, as it will be at inference, and the tokens' character offsets say which of them overlap an
answer. Tokenising the parts by themselves and adding up their lengths was left out: it breaks wherever a tokenizer joins
characters across a border. Works with every fast tokenizer, which in transformers 5 is every tokenizer.
"""

import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from zero_sft.data.templates.rendered import RenderedText
from zero_sft.errors import DataError

IGNORE_INDEX = -100
"""The label of a token that isn't trained on; PyTorch's cross entropy skips it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSample:
    """One sample as tokens: `labels[i]` is `input_ids[i]`, for `trained_tokens` of them, or -100.

    `cut_tokens` went beyond the longest length, and `cut_trained_tokens` of these would have been trained on. `thoughts` and
    `dropped_thoughts`: as in `RenderedText`. `ends`: of a sample that was cut, the turn of each answer, and the tokens up to
    its end.
    """

    input_ids: list[int]
    labels: list[int]
    trained_tokens: int
    cut_tokens: int = 0
    cut_trained_tokens: int = 0
    thoughts: int = 0
    dropped_thoughts: int = 0
    ends: tuple[tuple[int, int], ...] = ()


def tokenize_rendered(
    rendered: Sequence[RenderedText], tokenizer: PreTrainedTokenizerBase, model_max_length: int
) -> list[TokenizedSample]:
    """Ids and labels of each text, cut to `model_max_length` tokens at the end.

    Raises:
        DataError: the tokenizer can't tell which characters its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters a token comes from, so the assistant's text can't be "
            "found. Convert the model's tokenizer to a tokenizer.json.",
            code="data.tokenizer_without_offsets",
        )
    added = frozenset(tokenizer.added_tokens_decoder)
    examples: dict[int, TokenizedSample] = {}
    for adds in (True, False):
        places = [place for place, each in enumerate(rendered) if each.adds_special_tokens == adds]
        if not places:
            continue
        encoded = tokenizer(
            [rendered[place].text for place in places],
            add_special_tokens=adds,
            return_attention_mask=False,
            verbose=False,  # it would warn of texts longer than the model; they are cut, and counted
        )
        for place, ids, encoding in zip(places, encoded["input_ids"], encoded.encodings or (), strict=True):
            chars_of = encoding.token_to_chars
            while ids and chars_of(len(ids) - 1) is None:  # added at the end; the text has an end of its own
                ids.pop()
            ranges, start = [], 0
            for span in rendered[place].spans:
                ranges.append(_trained_range(chars_of, ids, span, added, start))
                start = ranges[-1][1]
            examples[place] = _example(ids, ranges, model_max_length, rendered[place])
            if len(ids) > model_max_length:
                examples[place] = replace(examples[place], ends=_token_ends(chars_of, len(ids), rendered[place].ends))
    return [examples[place] for place in range(len(rendered))]


def token_range(
    chars_of: Callable[[int], tuple[int, int] | None], count: int, span: tuple[int, int], start: int = 0
) -> tuple[int, int]:
    """The half-open range of tokens whose characters overlap a span, of `count` tokens in the order of the text.

    `start`: a token that is known not to be past the range. The nearer it is, the fewer tokens are looked at.

    A token without characters of its own (a word-start mark before a character that is split into bytes) counts where it
    stands. Special tokens that the tokenizer adds have no characters, `None`; they stand at the ends.

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
    """The first number from `low` on for which something holds that then holds for all; `high` if there is none below.

    Asked for numbers at growing distances first, so that the cost depends on how far it is, not on how many there are.
    """
    step = 1
    while low + step < high and not holds(low + step - 1):
        low, step = low + step, 2 * step
    return low + bisect.bisect_left(range(low, min(low + step, high)), True, key=holds)


def _token_ends(
    chars_of: Callable[[int], tuple[int, int] | None], count: int, ends: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """For places of turns in the text, how many tokens there are up to them."""
    found, start = [], 0
    for turn, place in ends:
        _, start = token_range(chars_of, count, (place - 1, place), start)
        found.append((turn, start))
    return tuple(found)


def _trained_range(
    chars_of: Callable[[int], tuple[int, int] | None],
    ids: Sequence[int],
    span: tuple[int, int],
    added: Collection[int],
    start: int,
) -> tuple[int, int]:
    """`token_range`, without a token added to the vocabulary that begins before the span: one that takes the white
    space behind it, as Phi-3's header does."""
    first, last = token_range(chars_of, len(ids), span, max(0, start - 1))
    while first < last and (chars_of(first) or span)[0] < span[0] and ids[first] in added:
        first += 1
    return first, last


def _example(
    ids: list[int], ranges: Sequence[tuple[int, int]], model_max_length: int, rendered: RenderedText
) -> TokenizedSample:
    labels = [IGNORE_INDEX] * len(ids)
    trained, reached = 0, 1  # nothing comes before the first token that could tell it
    for first, last in ranges:
        start = max(first, reached)
        if start < last:
            labels[start:last] = ids[start:last]
            trained += last - start
            reached = last
    kept = trained if len(ids) <= model_max_length else sum(label != IGNORE_INDEX for label in labels[:model_max_length])
    return TokenizedSample(
        input_ids=ids[:model_max_length],
        labels=labels[:model_max_length],
        trained_tokens=kept,
        cut_tokens=max(0, len(ids) - model_max_length),
        cut_trained_tokens=trained - kept,
        thoughts=rendered.thoughts,
        dropped_thoughts=rendered.dropped_thoughts,
    )
