"""From samples to tokens: plain data that travels to the data loader's workers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zero_sft.data.conversation import Conversation, Passage, Sample, Turn
from zero_sft.data.labels import Example, tokenise
from zero_sft.data.rendered import Rendered
from zero_sft.data.templates import Template, render
from zero_sft.errors import DataError

_AT_ONCE = 1000
"""Samples rendered and tokenised together; enough for the tokenizer's threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A tokenizer, a template and the longest length, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int

    def examples(self, samples: Sequence[Sample], bad: list[str] | None = None) -> Iterator[tuple[Sample, Example]]:
        """Render and tokenise, in order. What can't be rendered is left out with its error in `bad`, if that is given."""
        for start in range(0, len(samples), _AT_ONCE):
            some = samples[start : start + _AT_ONCE]
            rendered = [(sample, text) for sample in some if (text := self._render(sample, bad)) is not None]
            examples = tokenise([text for _, text in rendered], self.tokenizer, self.model_max_length)
            yield from zip((sample for sample, _ in rendered), examples, strict=True)

    def _render(self, sample: Sample, bad: list[str] | None) -> Rendered | None:
        try:
            return render(sample, self.template, self.tokenizer)
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
            return None

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Columns of ids and labels from the column of `_lazy_dataset`, for the rows that are needed now."""
        examples = [each for _, each in self.examples([_sample(json.loads(text)) for text in rows["sample"]])]
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def _sample(fields: dict) -> Sample:
    """A sample from what `asdict` made of it."""
    if "turns" not in fields:
        return Passage(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
