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

from zero_sft.data.conversation import SYSTEM, Conversation, Passage, Sample, Turn
from zero_sft.data.embedded import require_embedded
from zero_sft.data.formats import Reading
from zero_sft.data.labels import Example, tokenise
from zero_sft.data.long import DROP, SPLIT, split_rounds
from zero_sft.data.reader import Reader
from zero_sft.data.rendered import Rendered
from zero_sft.data.report import MOST_SHOWN, DataReport
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
    """How objects become rows. `model_max_length` is in tokens; `lazy` puts off the tokenising.

    `embedding_rows`: ids from there on are refused; None where the tokenizer has no such.
    """

    reader: Reader
    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int
    lazy: bool = False
    embedding_rows: int | None = None

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
        answered = [each for each in reading.samples if self._is_answered(each)]
        bad = list(reading.bad)
        dropped = Counter({NO_ANSWER: len(reading.samples) - len(answered)})
        skipped = bad if self.reader.skips_bad else None
        if self.lazy:
            answered, account = self._looked_at(answered, skipped)
            texts = [json.dumps(asdict(each)) for each in answered]
            return self._part(reading, answered, {"sample": texts}, {"bad": bad, "dropped": dropped, **account})
        whole = list(self._examples(answered, skipped))
        used, kept, split, lost = [], [], 0, Counter[str]()
        for sample, example in whole:
            if self.reader.long == DROP and example.cut_tokens:
                dropped[TOO_LONG] += 1
                continue
            examples = self._split(sample, example, lost, skipped)
            trained = [each for each in examples if each.trained_tokens]
            if trained:
                used.append(sample)
                kept += trained
                split += trained[0] is not example
                lost[CUT_OFF] += len(examples) - len(trained)
            elif examples:
                dropped[CUT_OFF if example.cut_tokens else NO_ANSWER] += 1
        shortest = min((_length(each) for _, each in whole), default=None)
        account = {"bad": bad, "dropped": dropped, "split": split, "lost": dict(lost), "shortest": shortest, **_counts(kept)}
        return self._part(reading, used, _columns(kept), account)

    def _looked_at(self, samples: Sequence[Sample], bad: list[str] | None) -> tuple[list[Sample], dict[str, Any]]:
        """The samples to be tokenised later, after a look at as few as tell that they can be used, and the account of these.

        What fails on every sample fails now: so one is tokenised, and the next as long as nothing is trained on in them; all,
        where there are ids to look for.
        """
        if self.embedding_rows is not None:
            samples = [sample for sample, _ in self._examples(samples, bad)]
        elif bad is not None:
            samples = [sample for sample in samples if self._render(sample, bad) is not None]
        shortest = None
        for _, example in (each for sample in samples for each in self._examples([sample])):
            if example.trained_tokens:
                return list(samples), {"has_trained": True}
            shortest = _length(example) if shortest is None else min(shortest, _length(example))
        return list(samples), {"has_trained": False, "shortest": shortest}

    def _part(self, reading: Reading, used: Sequence[Sample], columns: Mapping[str, list], account: Mapping[str, Any]) -> Part:
        rows = pyarrow.RecordBatch.from_pydict(dict(columns), schema=self.schema)
        bad, dropped = account["bad"], account["dropped"]
        talks = [each for each in used if isinstance(each, Conversation)]
        report = DataReport(
            file="",
            template=self.template.name,
            layouts=reading.layouts,
            samples=len(reading.samples) + len(reading.bad),
            kept=rows.num_rows,
            turns=sum(turn.role != SYSTEM for each in talks for turn in each.turns),
            leading_turns=reading.leading_turns,
            unanswered_turns=reading.unanswered_turns,
            unread=reading.unread,
            empty_answers=sum(each.empty_answers(blank_counts=self.template.trains_on_blanks) for each in used),
            **{
                **account,
                "bad": len(bad),
                "first_bad": tuple(bad[:MOST_SHOWN]),
                "dropped": {reason: count for reason, count in dropped.items() if count},
            },
        )
        return Part(rows=rows, report=report)

    def _is_answered(self, sample: Sample) -> bool:
        return sample.answers(blank_counts=self.template.trains_on_blanks) > 0

    def _examples(self, samples: Sequence[Sample], bad: list[str] | None = None) -> Iterator[tuple[Sample, Example]]:
        """Render and tokenise, in order. What can't be rendered is left out with its error in `bad`, if that is given."""
        rendered = [(sample, text) for sample in samples if (text := self._render(sample, bad)) is not None]
        examples = tokenise([text for _, text in rendered], self.tokenizer, self.model_max_length)
        for (sample, text), example in zip(rendered, examples, strict=True):
            if self.embedding_rows is not None:
                try:
                    require_embedded(example.input_ids, self.tokenizer, self.embedding_rows, text.where)
                except DataError as error:
                    if bad is None:
                        raise
                    bad.append(str(error))
                    continue
            yield sample, example

    def _render(self, sample: Sample, bad: list[str] | None) -> Rendered | None:
        try:
            return render(sample, self.template, self.tokenizer)
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
            return None

    def _split(self, sample: Sample, example: Example, lost: Counter[str], bad: list[str] | None) -> list[Example]:
        """A sample itself, or its parts where it is too long and to be split; those without an answer are `lost`.

        Where a part can't be rendered, nothing, with the error in `bad`, if that is given.
        """
        if self.reader.long != SPLIT or not example.cut_tokens or not isinstance(sample, Conversation):
            return [example]

        def fits(part: Sample) -> bool:
            return all(not each.cut_tokens for _, each in self._examples([part]))

        try:
            parts = split_rounds(sample, fits)
            if len(parts) == 1:
                return [example]
            answered = [part for part in parts if self._is_answered(part)]
            examples = [each for _, each in self._examples(answered)]
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
            return []
        lost[NO_ANSWER] += len(parts) - len(answered)
        return examples

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Columns of ids and labels of rows of `TEXTS`, those that are needed now."""
        examples = [each for _, each in self._examples([_sample(json.loads(text)) for text in rows["sample"]])]
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def _columns(examples: Sequence[Example]) -> dict[str, list]:
    return {
        "input_ids": [each.input_ids for each in examples],
        "labels": [each.labels for each in examples],
        "length": [len(each.input_ids) for each in examples],
    }


def _counts(kept: Sequence[Example]) -> dict[str, int | None]:
    return {
        "tokens": sum(len(each.input_ids) for each in kept),
        "trained_tokens": sum(each.trained_tokens for each in kept),
        "thoughts": sum(each.thoughts for each in kept),
        "dropped_thoughts": sum(each.dropped_thoughts for each in kept),
        "cut_samples": sum(each.cut_tokens > 0 for each in kept),
        "cut_tokens": sum(each.cut_tokens for each in kept),
        "cut_trained_tokens": sum(each.cut_trained_tokens for each in kept),
        "longest": max(map(_length, kept), default=None),
    }


def _length(example: Example) -> int:
    """In tokens, before it was cut."""
    return len(example.input_ids) + example.cut_tokens


def _sample(fields: dict) -> Sample:
    """A sample from what `asdict` made of it."""
    if "turns" not in fields:
        return Passage(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
