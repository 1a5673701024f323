"""Turn objects of a file into rows of a dataset, with plain data and pure functions that can be sent to worker processes.

A row is a tokenised sample: `input_ids`, `labels` and `length`. With lazy tokenising it is the sample as JSON text, and
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
    """Rows made from a batch of objects, with `Pipeline.schema`, and the report on those objects."""

    rows: pyarrow.RecordBatch
    report: DataReport


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Columns of rows and the samples in them; errors of bad samples, and counts of dropped samples by reason.

    `statistics` are further fields of their `DataReport`.
    """

    columns: Mapping[str, list]
    samples: Sequence[Sample]
    bad: Sequence[str]
    dropped: Mapping[str, int] = field(default_factory=dict)
    statistics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps from objects to rows: parse, render, tokenise, label.

    `model_max_length` is in tokens. `lazy` postpones tokenising until a row is needed. A token id of `embedding_rows` or
    more is refused, since the model has no embedding for it. None: the tokenizer has no such ids, so none is checked.
    """

    parser: SampleParser
    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int
    lazy: bool = False
    embedding_rows: int | None = None

    @property
    def schema(self) -> pyarrow.Schema:
        """The Arrow schema of the rows."""
        return TEXTS if self.lazy else TOKENS

    def make_rows(self, objects: Sequence[tuple[Any, str]]) -> RowBatch:
        """Make the rows of a batch of objects, each with its place for messages, in order.

        Raises:
            DataError: a bad sample, unless bad samples are skipped.
        """
        parsed = self.parser.read(objects)
        answered = [sample for sample in parsed.samples if self._is_answered(sample)]
        result = self._text_rows(answered) if self.lazy else self._token_rows(answered)
        rows = pyarrow.RecordBatch.from_pydict(dict(result.columns), schema=self.schema)
        bad, dropped = [*parsed.bad, *result.bad], Counter({NO_ANSWER: len(parsed.samples) - len(answered)})
        dropped.update(result.dropped)
        conversations = [sample for sample in result.samples if isinstance(sample, Conversation)]
        report = DataReport(
            file="",
            template=self.template.name,
            formats=parsed.formats,
            samples=len(parsed.samples) + len(parsed.bad),
            kept=rows.num_rows,
            turns=sum(turn.role != SYSTEM for conversation in conversations for turn in conversation.turns),
            dropped_turns=parsed.dropped_turns,
            unread_keys=parsed.unread_keys,
            empty_answers=sum(sample.empty_answers(blank_counts=self.template.trains_on_blanks) for sample in result.samples),
            bad=len(bad),
            first_bad=tuple(bad[:MOST_SHOWN]),
            dropped={reason: count for reason, count in dropped.items() if count},
            **result.statistics,
        )
        return RowBatch(rows=rows, report=report)

    def _text_rows(self, samples: Sequence[Sample]) -> _Rows:
        """Keep samples as text, to be tokenised later, but check now that they can be used.

        An error that affects every sample should be raised now. So samples are tokenised until one has something to train on.
        If ids must be checked, all samples are tokenised.
        """
        usable, bad = list(samples), list[str]()
        if self.embedding_rows is not None:
            tokenized, bad = self._tokenize(samples, skip_bad=self.parser.skips_bad)
            usable = [sample for sample, _ in tokenized]
        elif self.parser.skips_bad:
            rendered, bad = self._render(samples, skip_bad=True)
            usable = [sample for sample, _ in rendered]
        return _Rows(
            columns={"sample": [json.dumps(asdict(sample)) for sample in usable]},
            samples=usable,
            bad=bad,
            statistics=self._trained_statistics(usable),
        )

    def _trained_statistics(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Tokenise samples until one has something to train on; if none has, report the shortest length."""
        lengths = []
        for sample in samples:
            tokenized = self._tokenize_one(sample)
            if tokenized.trained_tokens:
                return {"has_trained": True}
            lengths.append(_length(tokenized))
        return {"has_trained": False, "shortest": min(lengths, default=None)}

    def _token_rows(self, samples: Sequence[Sample]) -> _Rows:
        """Tokenise and label samples.

        A sample longer than the window is truncated, split or dropped, as the parser's `overlong` says. A sample is also
        dropped if nothing in it is trained on.
        """
        tokenized_samples, bad = self._tokenize(samples, skip_bad=self.parser.skips_bad)
        used, kept, split = list[Sample](), list[TokenizedSample](), 0
        dropped, dropped_parts = Counter[str](), Counter[str]()
        for sample, tokenized in tokenized_samples:
            if self.parser.overlong == DROP and tokenized.cut_tokens:
                dropped[TOO_LONG] += 1
                continue
            try:
                parts, unanswered = self._split(sample, tokenized)
            except DataError as error:
                if not self.parser.skips_bad:
                    raise
                bad.append(str(error))
                continue
            dropped_parts[NO_ANSWER] += unanswered
            trained = [part for part in parts if part.trained_tokens]
            if trained:
                used.append(sample)
                kept += trained
                split += trained[0] is not tokenized
                dropped_parts[CUT_OFF] += len(parts) - len(trained)
            elif parts:
                dropped[CUT_OFF if tokenized.cut_tokens else NO_ANSWER] += 1
        shortest = min((_length(tokenized) for _, tokenized in tokenized_samples), default=None)
        statistics = {"split": split, "dropped_parts": dict(dropped_parts), "shortest": shortest, **_token_statistics(kept)}
        return _Rows(columns=_columns(kept), samples=used, bad=bad, dropped=dropped, statistics=statistics)

    def _split(self, sample: Sample, tokenized: TokenizedSample) -> tuple[list[TokenizedSample], int]:
        """Split a conversation longer than the window, if `overlong` asks for it; else return it whole.

        Returns the parts that have an answer, and the number of parts without one.

        Raises:
            DataError: a part that can't be rendered.
        """
        if self.parser.overlong != SPLIT or not tokenized.cut_tokens or not isinstance(sample, Conversation):
            return [tokenized], 0
        parts = split_rounds(sample, tokenized, self.model_max_length, self._tokenize_one)
        if len(parts) == 1:
            return [tokenized], 0
        answered = [tokenized_part for part, tokenized_part in parts if self._is_answered(part)]
        return answered, len(parts) - len(answered)

    def _is_answered(self, sample: Sample) -> bool:
        return sample.answers(blank_counts=self.template.trains_on_blanks) > 0

    def _tokenize_one(self, sample: Sample) -> TokenizedSample:
        ((_, tokenized),), _ = self._tokenize([sample])
        return tokenized

    def _tokenize(
        self, samples: Sequence[Sample], *, skip_bad: bool = False
    ) -> tuple[list[tuple[Sample, TokenizedSample]], list[str]]:
        """Tokenise samples in order. With `skip_bad`, leave bad samples out and return their errors; else raise the first."""
        rendered, bad = self._render(samples, skip_bad=skip_bad)
        tokenized_texts = tokenize_rendered([text for _, text in rendered], self.tokenizer, self.model_max_length)
        kept = []
        for (sample, text), tokenized in zip(rendered, tokenized_texts, strict=True):
            try:
                if self.embedding_rows is not None:
                    require_embedded(tokenized.input_ids, self.tokenizer, self.embedding_rows, text.where)
            except DataError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
            else:
                kept.append((sample, tokenized))
        return kept, bad

    def _render(self, samples: Sequence[Sample], *, skip_bad: bool) -> tuple[list[tuple[Sample, RenderedText]], list[str]]:
        """Render samples as text; `skip_bad` is as in `_tokenize`."""
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
        """Tokenise rows of `TEXTS` that are needed now; return columns of ids and labels."""
        tokenized, _ = self._tokenize([_sample_from_fields(json.loads(text)) for text in rows["sample"]])
        samples = [sample for _, sample in tokenized]
        return {"input_ids": [sample.input_ids for sample in samples], "labels": [sample.labels for sample in samples]}


def _columns(samples: Sequence[TokenizedSample]) -> dict[str, list]:
    return {
        "input_ids": [sample.input_ids for sample in samples],
        "labels": [sample.labels for sample in samples],
        "length": [len(sample.input_ids) for sample in samples],
    }


def _token_statistics(kept: Sequence[TokenizedSample]) -> dict[str, int | None]:
    return {
        "tokens": sum(len(sample.input_ids) for sample in kept),
        "trained_tokens": sum(sample.trained_tokens for sample in kept),
        "thoughts": sum(sample.thoughts for sample in kept),
        "dropped_thoughts": sum(sample.dropped_thoughts for sample in kept),
        "cut_samples": sum(sample.cut_tokens > 0 for sample in kept),
        "cut_tokens": sum(sample.cut_tokens for sample in kept),
        "cut_trained_tokens": sum(sample.cut_trained_tokens for sample in kept),
        "longest": max(map(_length, kept), default=None),
    }


def _length(sample: TokenizedSample) -> int:
    """Return a sample's length in tokens before truncation."""
    return len(sample.input_ids) + sample.cut_tokens


def _sample_from_fields(fields: dict) -> Sample:
    """Restore a sample from its `asdict`."""
    if "turns" not in fields:
        return PromptCompletion(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
