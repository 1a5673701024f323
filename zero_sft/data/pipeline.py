"""From objects of a file to rows of a dataset: plain data and pure functions, which travel to worker processes.

A row is a sample as tokens, `input_ids`, `labels` and `length`; or, where tokenising is put off, as JSON text, of which
`Pipeline.__call__` makes ids and labels when they are needed.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from zero_sft.data.conversation import Conversation, Passage, Sample, Turn
from zero_sft.data.formats import Reading
from zero_sft.data.labels import Example, tokenise
from zero_sft.data.long import DROP, SPLIT, split_rounds
from zero_sft.data.reader import Reader
from zero_sft.data.rendered import Rendered
from zero_sft.data.report import DataReport
from zero_sft.data.templates import Template, render
from zero_sft.errors import DataError

NO_ANSWER = "without an answer to train on"
CUT_OFF = "cut off before the first answer"
TOO_LONG = "longer than --model_max_length"

_IDS = pyarrow.list_(pyarrow.int32())
TOKENS = pyarrow.schema([("input_ids", _IDS), ("labels", _IDS), ("length", pyarrow.int32())])
TEXTS = pyarrow.schema([("sample", pyarrow.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows made of some objects, of `Pipeline.schema`, and what became of those objects."""

    rows: pyarrow.RecordBatch
    report: DataReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How objects become rows. `model_max_length` is in tokens; `lazy` puts off the tokenising."""

    reader: Reader
    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int
    lazy: bool = False

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the rows."""
        return TEXTS if self.lazy else TOKENS

    def part(self, objects: Sequence[tuple[Any, str]]) -> Part:
        """Rows of some objects, each given with its place, in their order.

        Raises:
            DataError: a bad sample, unless such are skipped.
        """
        reading = self.reader.read(objects)
        answered = [each for each in reading.samples if each.answers]
        bad = list(reading.bad)
        dropped = Counter({NO_ANSWER: len(reading.samples) - len(answered)})
        if self.lazy:
            if self.reader.skips_bad:
                answered = [each for each in answered if self._render(each, bad) is not None]
            list(self._examples(answered[:1]))  # what fails on every sample fails now
            texts = [json.dumps(asdict(each)) for each in answered]
            return self._part(reading, {"sample": texts}, {"bad": bad, "dropped": dropped})
        made = list(self._examples(answered, bad if self.reader.skips_bad else None))
        lengths = [len(each.input_ids) + each.cut_tokens for _, each in made]
        split = 0
        if self.reader.long == DROP:
            dropped[TOO_LONG] = sum(each.cut_tokens > 0 for _, each in made)
            made = [(sample, each) for sample, each in made if not each.cut_tokens]
        elif self.reader.long == SPLIT:
            made, split = self._split(made)
        kept = [each for _, each in made if each.trained_tokens]
        dropped[CUT_OFF] = len(made) - len(kept)
        counts = {
            "split": split,
            "tokens": sum(len(each.input_ids) for each in kept),
            "trained_tokens": sum(each.trained_tokens for each in kept),
            "cut_samples": sum(each.cut_tokens > 0 for each in kept),
            "cut_tokens": sum(each.cut_tokens for each in kept),
            "cut_trained_tokens": sum(each.cut_trained_tokens for each in kept),
            "shortest": min(lengths, default=None),
            "longest": max(lengths, default=None),
        }
        columns = {
            "input_ids": [each.input_ids for each in kept],
            "labels": [each.labels for each in kept],
            "length": [len(each.input_ids) for each in kept],
        }
        return self._part(reading, columns, {"bad": bad, "dropped": dropped, **counts})

    def _part(self, reading: Reading, columns: Mapping[str, list], account: Mapping[str, Any]) -> Part:
        rows = pyarrow.RecordBatch.from_pydict(dict(columns), schema=self.schema)
        bad, dropped = account["bad"], account["dropped"]
        report = DataReport(
            file="",
            template=self.template.name,
            layouts=reading.layouts,
            samples=len(reading.samples) + len(reading.bad),
            kept=rows.num_rows,
            turns=sum(len(each.turns) for each in reading.samples if isinstance(each, Conversation)),
            leading_turns=reading.leading_turns,
            unanswered_turns=reading.unanswered_turns,
            empty_answers=sum(each.empty_answers for each in reading.samples),
            **{
                **account,
                "bad": len(bad),
                "first_bad": next(iter(bad), None),
                "dropped": {reason: count for reason, count in dropped.items() if count},
            },
        )
        return Part(rows=rows, report=report)

    def _examples(self, samples: Sequence[Sample], bad: list[str] | None = None) -> Iterator[tuple[Sample, Example]]:
        """Render and tokenise, in order. What can't be rendered is left out with its error in `bad`, if that is given."""
        rendered = [(sample, text) for sample in samples if (text := self._render(sample, bad)) is not None]
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

    def _split(self, made: Sequence[tuple[Sample, Example]]) -> tuple[list[tuple[Sample, Example]], int]:
        """What is too long in parts, and how many samples that were."""

        def fits(sample: Sample) -> bool:
            return all(not each.cut_tokens for _, each in self._examples([sample]))

        result, split = [], 0
        for sample, example in made:
            parts = split_rounds(sample, fits) if example.cut_tokens and isinstance(sample, Conversation) else []
            if len(parts) > 1:
                split += 1
                result += self._examples([part for part in parts if part.answers])
            else:
                result.append((sample, example))
        return result, split

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Columns of ids and labels of rows of `TEXTS`, those that are needed now."""
        examples = [each for _, each in self._examples([_sample(json.loads(text)) for text in rows["sample"]])]
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def _sample(fields: dict) -> Sample:
    """A sample from what `asdict` made of it."""
    if "turns" not in fields:
        return Passage(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
