"""From text to token ids and labels: a token is trained on where its characters belong to an answer.

The whole text is tokenised once, as it will be at inference, and the tokens' character offsets say which of them overlap an
answer. Tokenising the parts by themselves and adding up their lengths was left out: it breaks wherever a tokenizer joins
characters across a border. Works with every fast tokenizer, which in transformers 5 is every tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zero_sft.data.rendered import Rendered
from zero_sft.errors import DataError

IGNORED = -100
"""The label of a token that isn't trained on; PyTorch's cross entropy skips it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample as tokens: `labels[i]` is `input_ids[i]` or -100. `cut_tokens` went beyond the longest length."""

    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0
    cut_trained_tokens: int = 0

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORED for label in self.labels)


def tokenise(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, model_max_length: int) -> list[Example]:
    """Ids and labels of each text, cut to `model_max_length` tokens at the end.

    Raises:
        DataError: the tokenizer can't tell which characters its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters a token comes from, so the assistant's text can't be "
            "found. Convert the model's tokenizer to a tokenizer.json."
        )
    examples: dict[int, Example] = {}
    for adds in (True, False):
        places = [place for place, each in enumerate(rendered) if each.adds_special_tokens == adds]
        if not places:
            continue
        encoded = tokenizer(
            [rendered[place].text for place in places],
            add_special_tokens=adds,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # it would warn of texts longer than the model; they are cut, and counted
        )
        for place, ids, offsets in zip(places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            examples[place] = _example(ids, trained_tokens(offsets, rendered[place].spans), model_max_length)
    return [examples[place] for place in range(len(rendered))]


def trained_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether it is trained on: whether its characters overlap one of the ascending, disjoint `spans`.

    A token without characters of its own (a word-start mark before a character that is split into bytes) counts where it
    stands. Special tokens that the tokenizer adds stand at 0, before every span.

    Worked example: offsets (0,0) (0,4) (4,6) (6,6) (6,7), span [5,7) → no, no, yes, yes, yes.
    """
    trained, position = [False] * len(offsets), 0
    for index, (first, last) in enumerate(offsets):
        while position < len(spans) and spans[position][1] <= first:
            position += 1
        if position < len(spans):
            start = spans[position][0]
            trained[index] = last > start or first == last >= start
    return trained


def _example(ids: list[int], trained: list[bool], model_max_length: int) -> Example:
    trained = [False, *trained[1:]]  # nothing comes before the first token that could tell it
    labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, trained, strict=True)]
    return Example(
        input_ids=ids[:model_max_length],
        labels=labels[:model_max_length],
        cut_tokens=max(0, len(ids) - model_max_length),
        cut_trained_tokens=sum(trained[model_max_length:]),
    )
