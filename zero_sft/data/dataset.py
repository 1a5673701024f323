"""What the trainer takes: a dataset of token ids and labels, and an account of the data.

Every rank reads the files by itself; nothing here communicates, so the caller wraps it in an agreement. By default all samples
are tokenised at the start, and those without a trained token are left out. With `lazy` a sample is rendered and tokenised
each time it is needed and nothing is kept: memory is that of the texts, and a sample cut off before its first answer
stays in, without labels.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from zero_sft.data.conversation import ASSISTANT, Conversation, Passage, Sample
from zero_sft.data.formats import Reading, read_samples
from zero_sft.data.labels import Example
from zero_sft.data.long import DROP, SPLIT, TRUNCATE, split_rounds
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.report import DataReport, listed
from zero_sft.data.templates import choose_template
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

NO_ANSWER = "without an answer to train on"
CUT_OFF = "cut off before the first answer"
TOO_LONG = "longer than --model_max_length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A dataset for the trainer, with `input_ids`, `labels` and, unless lazy, `length`; and the reports of its sources.

    `mixed` says how often each source's samples are in it, where they were given weights. `transform` is what makes ids and
    labels of a lazy dataset's column.
    """

    dataset: "datasets.Dataset"
    reports: tuple[DataReport, ...]
    mixed: tuple[str, ...] = ()
    transform: Pipeline | None = None

    def lines(self) -> list[str]:
        """The reports for the log."""
        return [*(line for report in self.reports for line in report.lines()), *self.mixed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How samples are read: the layout they must have (None: found out), which answers count, what bad and long samples do.

    `train_on`: "all" answers, or the "last" of each sample. `on_bad_sample`: "error", or "skip", with an account in the report.
    `long`: what is longer than the window is "truncate"d, "split" between rounds, or "drop"ped.
    """

    data_format: str | None = None
    train_on: str = "all"
    on_bad_sample: str = "error"
    long: str = TRUNCATE

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
        reader: the layout, which answers count, and what bad and long samples do.

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
    split = 0
    if lazy:
        _require_truncation(reader)
        list(pipeline.examples(answered[:1]))  # what fails on every sample fails now
        dataset, counts = _lazy_dataset(answered, pipeline), {}
    else:
        made = list(pipeline.examples(answered, bad if reader.on_bad_sample == "skip" else None))
        if reader.long == DROP:
            dropped[TOO_LONG] = sum(each.cut_tokens > 0 for _, each in made)
            made = [(sample, each) for sample, each in made if not each.cut_tokens]
        elif reader.long == SPLIT:
            made, split = _split(made, pipeline)
        examples = [each for _, each in made]
        trainable = [each for each in examples if each.trained_tokens]
        dropped[CUT_OFF] = len(examples) - len(trainable)
        dataset, counts = _dataset(trainable), _counts(trainable)
    report = DataReport(
        file=str(path),
        layouts=reading.layouts,
        template=template.name,
        samples=len(reading.samples) + len(reading.bad),
        kept=dataset.num_rows,
        turns=sum(len(each.turns) for each in reading.samples if isinstance(each, Conversation)),
        split=split,
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


def _require_truncation(reader: Reader) -> None:
    if reader.long != TRUNCATE:
        raise DataError(
            f"--long {reader.long} takes the samples' lengths, which --lazy_preprocess does not know at the start. Leave one "
            "out."
        )


def _split(made: Sequence[tuple[Sample, Example]], pipeline: Pipeline) -> tuple[list[tuple[Sample, Example]], int]:
    """What is too long in parts, and how many samples that were."""

    def fits(sample: Sample) -> bool:
        return all(not each.cut_tokens for _, each in pipeline.examples([sample]))

    result, split = [], 0
    for sample, example in made:
        parts = split_rounds(sample, fits) if example.cut_tokens and isinstance(sample, Conversation) else []
        if len(parts) > 1:
            split += 1
            result += pipeline.examples([part for part in parts if part.answers])
        else:
            result.append((sample, example))
    return result, split


def _nothing_left(report: DataReport, examples: Sequence[Example], model_max_length: int) -> str:
    message = f"{report.file}: no sample is left in which anything is trained on ({listed(report.dropped)})."
    if CUT_OFF in report.dropped:
        shortest = min(len(each.input_ids) + each.cut_tokens for each in examples)
        return f"{message} --model_max_length is {model_max_length}, and the shortest has {shortest} tokens: raise it."
    if TOO_LONG in report.dropped:
        return f"{message} --model_max_length is {model_max_length}: raise it, or take --long truncate or split."
    if report.bad:
        return f"{message} {len(report.bad):,} can't be used, the first: {report.bad[0]}"
    return f"{message} Only answers are trained on: give samples with answers."


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
