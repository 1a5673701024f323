"""What the trainer takes: a dataset of token ids and labels, and an account of the data.

Every rank reads the files by itself; nothing here communicates, so the caller wraps it in an agreement. By default all samples
are tokenised at the start, and those without a trained token are left out. With `lazy` a sample is rendered and tokenised
each time it is needed and nothing is kept: memory is that of the texts, and a sample cut off before its first answer
stays in, without labels.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from zero_sft.data.conversation import ASSISTANT, Conversation, Passage, Sample, Turn
from zero_sft.data.formats import Reading, read_samples
from zero_sft.data.labels import Example, tokenise
from zero_sft.data.rendered import Rendered
from zero_sft.data.templates import Template, choose_template, render
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

NO_ANSWER = "without an answer to train on"
CUT_OFF = "cut off before the first answer"

_AT_ONCE = 1000
"""Samples rendered and tokenised together; enough for the tokenizer's threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file or folder. What only tokenising shows is None where samples are tokenised lazily.

    `bad` are the errors of the samples that were skipped; they count among `samples`.
    """

    file: str
    layouts: tuple[str, ...]
    template: str
    samples: int
    kept: int
    bad: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    leading_turns: int = 0
    unanswered_turns: int = 0
    empty_answers: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None
    cut_samples: int | None = None
    cut_tokens: int | None = None
    cut_trained_tokens: int | None = None

    def lines(self) -> list[str]:
        """The report for the log: what there is, then only what was left out."""
        found = f"format {' and '.join(self.layouts)}, template {self.template}"
        lines = [f"{self.file}: {self.kept:,} of {self.samples:,} samples ({found})"]
        if self.tokens is not None:
            lines.append(f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained on")
        if self.bad:
            lines.append(f"{len(self.bad):,} bad samples skipped, the first: {self.bad[0]}")
        if self.dropped:
            lines.append("samples dropped: " + _listed(self.dropped))
        if self.cut_samples:
            lines.append(
                f"{self.cut_samples:,} samples longer than --model_max_length: {self.cut_tokens:,} tokens cut off, "
                f"{self.cut_trained_tokens:,} of them answers"
            )
        turns = {"leading, not the user's": self.leading_turns, "last, unanswered": self.unanswered_turns}
        if any(turns.values()):
            lines.append("turns dropped: " + _listed(turns))
        if self.empty_answers:
            lines.append(f"{self.empty_answers:,} empty answers, not trained on")
        return lines


def _listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A dataset for the trainer, with `input_ids`, `labels` and, unless lazy, `length`; and the reports of its sources.

    `mixed` says how often each source's samples are in it, where they were given weights. `transform` is what makes ids and
    labels of a lazy dataset's column.
    """

    dataset: "datasets.Dataset"
    reports: tuple[DataReport, ...]
    mixed: tuple[str, ...] = ()
    transform: "Pipeline | None" = None

    def lines(self) -> list[str]:
        """The reports for the log."""
        return [*(line for report in self.reports for line in report.lines()), *self.mixed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How samples are read: the layout they must have (None: found out), which answers count, what bad samples do.

    `train_on`: "all" answers, or the "last" of each sample. `on_bad_sample`: "error", or "skip", with an account in the report.
    """

    data_format: str | None = None
    train_on: str = "all"
    on_bad_sample: str = "error"

    def read(self, path: Path) -> Reading:
        """All samples of a file or folder; errors as `read_samples`'."""
        reading = read_samples(path, self.data_format, skip_bad=self.on_bad_sample == "skip")
        if self.train_on == "last":
            reading = replace(reading, samples=tuple(map(_last_answer_alone, reading.samples)))
        return reading


def _last_answer_alone(sample: Sample) -> Sample:
    """A conversation of whose answers only the last is trained on."""
    if isinstance(sample, Passage):
        return sample
    last = max((number for number, turn in enumerate(sample.turns) if turn.role == ASSISTANT), default=0)
    turns = [turn if number == last else replace(turn, trained=False) for number, turn in enumerate(sample.turns)]
    return replace(sample, turns=tuple(turns))


def prepare(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    model_max_length: int,
    lazy: bool = False,
    reader: Reader = Reader(),
) -> Prepared:
    """Read, render, tokenise and label a file or folder of samples. Any rank by itself; does not communicate.

    Args:
        path: JSON, JSON lines, Parquet or a folder of them; see `layouts`.
        tokenizer: a fast one.
        chat_template: "vicuna", "chatml", "llama3", "model", the path of a Jinja file, or None for the tokenizer's own if it
            has one, else Vicuna's.
        model_max_length: in tokens; what is longer loses its end.
        lazy: tokenise when a sample is needed.
        reader: the layout, which answers count, and whether bad samples are skipped.

    Raises:
        DataError: a file that can't be used, a template that can't be masked, or nothing left to train on.
    """
    reading = reader.read(path)
    template = choose_template(chat_template, tokenizer)
    pipeline = Pipeline(tokenizer=tokenizer, template=template, model_max_length=model_max_length)
    answered = [each for each in reading.samples if each.answers]
    dropped = Counter({NO_ANSWER: len(reading.samples) - len(answered)})
    examples: list[Example] = []
    bad: list[str] = []
    if lazy:
        list(pipeline.examples(answered[:1]))  # what fails on every sample fails now
        dataset, counts = _lazy_dataset(answered, pipeline), {}
    else:
        examples = list(pipeline.examples(answered, bad if reader.on_bad_sample == "skip" else None))
        trainable = [each for each in examples if each.trained_tokens]
        dropped[CUT_OFF] = len(examples) - len(trainable)
        dataset, counts = _dataset(trainable), _counts(trainable)
    report = DataReport(
        file=str(path),
        layouts=reading.layouts,
        template=template.name,
        samples=len(reading.samples) + len(reading.bad),
        kept=dataset.num_rows,
        bad=(*reading.bad, *bad),
        dropped={reason: count for reason, count in dropped.items() if count},
        leading_turns=reading.leading_turns,
        unanswered_turns=reading.unanswered_turns,
        empty_answers=sum(each.empty_answers for each in reading.samples),
        **counts,
    )
    if not report.kept:
        raise DataError(_nothing_left(report, examples, model_max_length))
    return Prepared(dataset=dataset, reports=(report,), transform=pipeline if lazy else None)


def _nothing_left(report: DataReport, examples: Sequence[Example], model_max_length: int) -> str:
    message = f"{report.file}: no sample is left in which anything is trained on ({_listed(report.dropped)})."
    if CUT_OFF in report.dropped:
        shortest = min(len(each.input_ids) + each.cut_tokens for each in examples)
        return f"{message} --model_max_length is {model_max_length}, and the shortest has {shortest} tokens: raise it."
    if report.bad:
        return f"{message} {len(report.bad):,} can't be used, the first: {report.bad[0]}"
    return f"{message} Only answers are trained on: give samples with answers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """From samples to tokens: plain data that travels to the data loader's workers."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int

    def examples(self, samples: Sequence[Sample], bad: list[str] | None = None) -> Iterator[Example]:
        """Render and tokenise, in order. What can't be rendered is left out with its error in `bad`, if that is given."""
        for start in range(0, len(samples), _AT_ONCE):
            rendered = [self._render(each, bad) for each in samples[start : start + _AT_ONCE]]
            yield from tokenise([each for each in rendered if each], self.tokenizer, self.model_max_length)

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
        examples = list(self.examples([_sample(json.loads(text)) for text in rows["sample"]]))
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def require_one_batch(prepared: Prepared, *, world_size: int, per_device_batch_size: int) -> None:
    """Raise unless the samples fill one batch on every rank. Pure: the same on every rank.

    Raises:
        DataError: fewer samples than `world_size * per_device_batch_size`.
    """
    needed = world_size * per_device_batch_size
    usable, tokens = len(prepared.dataset), [report.tokens for report in prepared.reports]
    if usable < needed:
        files = ", ".join(report.file for report in prepared.reports)
        counted = "" if None in tokens else f" ({sum(filter(None, tokens)):,} tokens)"
        raise DataError(
            f"{files}: {usable} usable samples{counted}, and one batch needs {needed}: {per_device_batch_size} "
            f"on each of {world_size} ranks. Give more data, a smaller --per_device_train_batch_size, or fewer ranks."
        )


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    return {
        "tokens": sum(len(each.input_ids) for each in examples),
        "trained_tokens": sum(each.trained_tokens for each in examples),
        "cut_samples": sum(each.cut_tokens > 0 for each in examples),
        "cut_tokens": sum(each.cut_tokens for each in examples),
        "cut_trained_tokens": sum(each.cut_trained_tokens for each in examples),
    }


def _dataset(examples: Sequence[Example]) -> "datasets.Dataset":
    import datasets

    return datasets.Dataset.from_dict(
        {
            "input_ids": [each.input_ids for each in examples],
            "labels": [each.labels for each in examples],
            "length": [len(each.input_ids) for each in examples],
        }
    )


def _lazy_dataset(samples: Sequence[Sample], pipeline: Pipeline) -> "datasets.Dataset":
    import datasets

    texts = datasets.Dataset.from_dict({"sample": [json.dumps(asdict(each)) for each in samples]})
    return texts.with_transform(pipeline)


def _sample(fields: dict) -> Sample:
    """A sample from what `asdict` made of it."""
    if "turns" not in fields:
        return Passage(**fields)
    return Conversation(turns=tuple(Turn(**turn) for turn in fields["turns"]), where=fields["where"])
