"""From objects of a file to rows of a dataset: plain data and pure functions, which travel to worker processes.

A row is a sample as tokens, `input_ids`, `labels` and `length`; or, where tokenising is put off, as JSON text, of which
`Pipeline.__call__` makes ids and labels when they are needed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from zero_sft.data.report import MOST_SHOWN, DataReport
from zero_sft.data.samples.conversation import SYSTEM, Conversation, PromptCompletion, Sample, Turn
from zero_sft.data.samples.embedded_tokens import require_embedded
from zero_sft.data.samples.overlong import DROP, SPLIT, split_rounds
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.templates.choose import Template, render
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.tokenize import TokenizedSample, tokenize_rendered
from zero_sft.errors import DataError

NO_ANSWER = "without an answer to train on"
CUT_OFF = "cut off before the first answer"
TOO_LONG = "longer than --model_max_length"

_IDS = pyarrow.list_(pyarrow.int32())
TOKENS = pyarrow.schema([("input_ids", _IDS), ("labels", _IDS), ("length", pyarrow.int32())])
TEXTS = pyarrow.schema([("sample", pyarrow.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Rows made of some objects, of `Pipeline.schema`, and what became of those objects."""

    rows: pyarrow.RecordBatch
    report: DataReport


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Columns of rows, the samples that are in them, and why others are not: as errors, or counted by reason.

    `account`: what else a `DataReport` says of them.
    """

    columns: Mapping[str, list]
    samples: Sequence[Sample]
    bad: Sequence[str]
    dropped: Mapping[str, int] = field(default_factory=dict)
    account: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How objects become rows. `model_max_length` is in tokens; `lazy` puts off the tokenising.

    `embedding_rows`: ids from there on are refused; None where the tokenizer has no such.
    """

    reader: SampleParser
    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int
    lazy: bool = False
    embedding_rows: int | None = None

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the rows."""
        return TEXTS if self.lazy else TOKENS

    def part(self, objects: Sequence[tuple[Any, str]]) -> RowBatch:
        """Rows of some objects, each given with its place, in their order.

        Raises:
            DataError: a bad sample, unless such are skipped.
        """
        parsed = self.reader.read(objects)
        answered = [sample for sample in parsed.samples if self._is_answered(sample)]
        made = self._text_rows(answered) if self.lazy else self._token_rows(answered)
        rows = pyarrow.RecordBatch.from_pydict(dict(made.columns), schema=self.schema)
        bad, dropped = [*parsed.bad, *made.bad], Counter({NO_ANSWER: len(parsed.samples) - len(answered)})
        dropped.update(made.dropped)
        conversations = [sample for sample in made.samples if isinstance(sample, Conversation)]
        report = DataReport(
            file="",
            template=self.template.name,
            layouts=parsed.layouts,
            samples=len(parsed.samples) + len(parsed.bad),
            kept=rows.num_rows,
            turns=sum(turn.role != SYSTEM for conversation in conversations for turn in conversation.turns),
            dropped_turns=parsed.dropped_turns,
            unread=parsed.unread,
            empty_answers=sum(sample.empty_answers(blank_counts=self.template.trains_on_blanks) for sample in made.samples),
            bad=len(bad),
            first_bad=tuple(bad[:MOST_SHOWN]),
            dropped={reason: count for reason, count in dropped.items() if count},
            **made.account,
        )
        return RowBatch(rows=rows, report=report)

    def _text_rows(self, samples: Sequence[Sample]) -> _Rows:
        """Samples as they are, to be tokenised later, after a look at as few as tell that they can be used.

        What fails on every sample fails now: so one is tokenised, and the next as long as nothing is trained on in them; all,
        where there are ids to look for.
        """
        usable, bad = list(samples), list[str]()
        if self.embedding_rows is not None:
            tokenised, bad = self._tokenised(samples, skip_bad=self.reader.skips_bad)
            usable = [sample for sample, _ in tokenised]
        elif self.reader.skips_bad:
            rendered, bad = self._rendered(samples, skip_bad=True)
            usable = [sample for sample, _ in rendered]
        return _Rows(
            columns={"sample": [json.dumps(asdict(sample)) for sample in usable]},
            samples=usable,
            bad=bad,
            account=self._account_of_first(usable),
        )

    def _account_of_first(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Whether anything is trained on in one of the samples, and if not, how long the shortest is."""
        lengths = []
        for sample in samples:
            example = self._example(sample)
            if example.trained_tokens:
                return {"has_trained": True}
            lengths.append(_length(example))
        return {"has_trained": False, "shortest": min(lengths, default=None)}

    def _token_rows(self, samples: Sequence[Sample]) -> _Rows:
        """Samples as ids and labels. One that is too long is cut, split or dropped, as the reader says; one is dropped, too, if
        nothing is trained on in it.
        """
        tokenised, bad = self._tokenised(samples, skip_bad=self.reader.skips_bad)
        used, kept, split = list[Sample](), list[TokenizedSample](), 0
        dropped, lost = Counter[str](), Counter[str]()
        for sample, example in tokenised:
            if self.reader.overlong == DROP and example.cut_tokens:
                dropped[TOO_LONG] += 1
                continue
            try:
                examples, unanswered = self._split(sample, example)
            except DataError as error:
                if not self.reader.skips_bad:
                    raise
                bad.append(str(error))
                continue
            lost[NO_ANSWER] += unanswered
            trained = [part for part in examples if part.trained_tokens]
            if trained:
                used.append(sample)
                kept += trained
                split += trained[0] is not example
                lost[CUT_OFF] += len(examples) - len(trained)
            elif examples:
                dropped[CUT_OFF if example.cut_tokens else NO_ANSWER] += 1
        shortest = min((_length(example) for _, example in tokenised), default=None)
        account = {"split": split, "lost": dict(lost), "shortest": shortest, **_counts(kept)}
        return _Rows(columns=_columns(kept), samples=used, bad=bad, dropped=dropped, account=account)

    def _split(self, sample: Sample, example: TokenizedSample) -> tuple[list[TokenizedSample], int]:
        """A sample itself, or where it is too long and to be split, its parts that have an answer, and how many have none.

        Raises:
            DataError: a part that can't be rendered.
        """
        if self.reader.overlong != SPLIT or not example.cut_tokens or not isinstance(sample, Conversation):
            return [example], 0
        parts = split_rounds(sample, example, self.model_max_length, self._example)
        if len(parts) == 1:
            return [example], 0
        examples = [of_part for part, of_part in parts if self._is_answered(part)]
        return examples, len(parts) - len(examples)

    def _is_answered(self, sample: Sample) -> bool:
        return sample.answers(blank_counts=self.template.trains_on_blanks) > 0

    def _example(self, sample: Sample) -> TokenizedSample:
        ((_, example),), _ = self._tokenised([sample])
        return example

    def _tokenised(
        self, samples: Sequence[Sample], *, skip_bad: bool = False
    ) -> tuple[list[tuple[Sample, TokenizedSample]], list[str]]:
        """Samples as tokens, in order; with `skip_bad` also the errors of those that are left out, else the first is raised."""
        rendered, bad = self._rendered(samples, skip_bad=skip_bad)
        examples = tokenize_rendered([text for _, text in rendered], self.tokenizer, self.model_max_length)
        kept = []
        for (sample, text), example in zip(rendered, examples, strict=True):
            try:
                if self.embedding_rows is not None:
                    require_embedded(example.input_ids, self.tokenizer, self.embedding_rows, text.where)
            except DataError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
            else:
                kept.append((sample, example))
        return kept, bad

    def _rendered(self, samples: Sequence[Sample], *, skip_bad: bool) -> tuple[list[tuple[Sample, RenderedText]], list[str]]:
        """Samples as text; errors as `_tokenised`'s."""
        kept, bad = [], []
        for sample in samples:
            try:
                kept.append((sample, render(sample, self.template, self.tokenizer)))
            except DataError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
        return kept, bad

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Columns of ids and labels of rows of `TEXTS`, those that are needed now."""
        tokenised, _ = self._tokenised([_sample(json.loads(text)) for text in rows["sample"]])
        examples = [example for _, example in tokenised]
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def _columns(examples: Sequence[TokenizedSample]) -> dict[str, list]:
    return {
        "input_ids": [each.input_ids for each in examples],
        "labels": [each.labels for each in examples],
        "length": [len(each.input_ids) for each in examples],
    }


def _counts(kept: Sequence[TokenizedSample]) -> dict[str, int | None]:
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


def _length(example: TokenizedSample) -> int:
    """In tokens, before it was cut."""
    return len(example.input_ids) + example.cut_tokens


def _sample(fields: dict) -> Sample:
    """A sample from what `asdict` made of it."""
    if "turns" not in fields:
        return PromptCompletion(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
