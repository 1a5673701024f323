"""What the trainer takes: a dataset of token ids and labels, and an account of the data.

By default all samples are tokenised at the start, and those without a trained token are left out. With `lazy` a sample is
rendered and tokenised each time it is needed and nothing is kept: a sample cut off before its first answer stays in,
without labels. Either way the rows are in a file that is mapped, where a cache is named; nothing here communicates.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from zero_sft.console import progress
from zero_sft.data import cache
from zero_sft.data.pipeline import CUT_OFF, TOO_LONG, Pipeline, RowBatch
from zero_sft.data.report import DataReport, counted, listed, total
from zero_sft.data.samples.embedded_tokens import rows_to_check
from zero_sft.data.samples.overlong import TRUNCATE
from zero_sft.data.samples.parse import PLAIN, SampleParser
from zero_sft.data.samples.sample_formats import EXPECTED
from zero_sft.data.sources.data_path import Data
from zero_sft.data.templates.choose import Template
from zero_sft.data.workers import make_parts
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_MANY = 0.05
"""A share of samples that are of no use, above which something may be wrong with the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDataset:
    """Datasets of samples and of the rows that are trained on, which are the samples unless these are packed.

    `samples` has `input_ids`, `labels` and, unless lazy, `length`; in packed `rows`, `seq_lengths` takes the place of `length`.
    `reports` are those of the sources, and `notes` say how they were mixed. `packing_note` says how well the rows are filled;
    it is empty where nothing is packed. `transform` is what makes ids and labels of a lazy dataset's column. `keys` are those
    of the sources' rows in the cache.
    """

    samples: "datasets.Dataset"
    rows: "datasets.Dataset"
    reports: tuple[DataReport, ...]
    notes: tuple[str, ...] = ()
    packing_note: str = ""
    transform: Pipeline | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several samples."""
        return bool(self.packing_note)

    def unpacked(self) -> "PreparedDataset":
        """The same data, with the samples as the rows that are trained on."""
        return replace(self, rows=self.samples, packing_note="")

    def lines(self) -> list[str]:
        """The account of the samples for the log."""
        return [*(line for report in self.reports for line in report.lines()), *self.notes]

    def warnings(self) -> list[str]:
        """What looks wrong with the data."""
        warnings = []
        for each in self.reports:
            if each.bad > _MANY * each.samples:
                warnings.append(f"{each.file}: {each.bad / each.samples:.0%} of the samples are bad and were skipped")
            if each.untrained_share > _MANY:
                share = f"{each.untrained_share:.0%} of the {'usable ' if each.bad else ''}samples"
                warnings.append(f"{each.file}: nothing is trained on in {share} ({listed(each.dropped)})")
            if each.thoughts and each.dropped_thoughts == each.thoughts:
                warnings.append(
                    f"{each.file}: the template {each.template} leaves out the thoughts of all {each.thoughts:,} answers that "
                    "have some, so they are not trained on"
                )
        return warnings


def make_pipeline(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    model_max_length: int,
    lazy: bool = False,
    reader: SampleParser = PLAIN,
    embedding_rows: int | None = None,
) -> Pipeline:
    """How objects of a file become rows, for a model with so many `embedding_rows`; None: not known.

    Raises:
        DataError: options that contradict each other.
    """
    if lazy and reader.overlong != TRUNCATE:
        raise DataError(
            f"--overlong {reader.overlong} takes the samples' lengths, which --lazy_preprocess does not know at the start. "
            "Leave one out.",
            code="data.overlong_needs_lengths",
        )
    return Pipeline(
        reader=reader,
        tokenizer=tokenizer,
        template=template,
        model_max_length=model_max_length,
        lazy=lazy,
        embedding_rows=rows_to_check(tokenizer, embedding_rows),
    )


def prepare_source(data: Data, pipeline: Pipeline, *, processes: int = 1, root: Path | None = None) -> PreparedDataset:
    """Read, render, tokenise and label a source of samples. Any rank by itself; does not communicate.

    Args:
        data: a file, a folder, or a dataset of the hub.
        processes: how many work at it, where there is much of it.
        root: the folder of the cache; None keeps the rows in memory.

    Raises:
        DataError: a file that can't be used, a template that can't be masked, or nothing left to train on.
    """
    if root is None:
        parts = list(make_parts(pipeline, data.objects(), processes))
        table = pyarrow.Table.from_batches([each.rows for each in parts], schema=pipeline.schema)
        report = _report(data, [each.report for each in parts], pipeline)
        return _prepared(_in_memory(table), _of(data, report), pipeline)
    data.require_outside(root, option="--data_cache_dir", code="data.cache_inside_data")
    state = data.state()
    key = cache.key_of_rows(data, pipeline)
    start = time.monotonic()
    dataset, account, was_there = cache.keep(root, key, lambda file: _entry(file, data, state, pipeline, processes))
    if was_there:
        logger.info("  prepared before, in %s", root / key)
    else:
        logger.info("  prepared in %.0f s, kept in %s", time.monotonic() - start, root / key)
    return _opened(dataset, account, root / key, data, pipeline)


def open_prepared(root: Path, key: str, data: Data, pipeline: Pipeline, *, verify: bool) -> PreparedDataset | None:
    """What `prepare_source` has kept under that key; None where it has not. `verify`: as `cache.find`'s."""
    found = cache.find(root, key, verify=verify)
    return None if found is None else _opened(*found, root / key, data, pipeline)


def _opened(
    dataset: "datasets.Dataset", account: Mapping[str, Any], entry: Path, data: Data, pipeline: Pipeline
) -> PreparedDataset:
    """The rows of an entry of the cache, and their account, of this source and under this template's name."""
    try:
        report = DataReport(**{**account, **{name: tuple(account[name]) for name in ("layouts", "first_bad")}})
    except (TypeError, LookupError) as error:
        raise DataError(
            f"{entry} is damaged: {error}. Delete that folder; it will be made anew.", code="data.cache_entry_damaged"
        ) from error
    first_bad = tuple(each.replace(report.file, data.name, 1) for each in report.first_bad)  # it may have been moved
    report = replace(_of(data, report), file=data.name, template=pipeline.template.name, first_bad=first_bad)
    return replace(_prepared(dataset, report, pipeline), keys=[entry.name])


def _of(data: Data, report: DataReport) -> DataReport:
    """The report with what is to be said of the source itself."""
    return replace(report, left_out=data.left_out(), note=data.note())


def _prepared(dataset: "datasets.Dataset", report: DataReport, pipeline: Pipeline) -> PreparedDataset:
    transform = pipeline if pipeline.lazy else None
    samples = dataset.with_transform(pipeline) if transform else dataset
    return PreparedDataset(samples=samples, rows=samples, reports=(report,), transform=transform)


def _in_memory(table: pyarrow.Table) -> "datasets.Dataset":
    import datasets
    from datasets.table import InMemoryTable

    return datasets.Dataset(InMemoryTable(table))


def _entry(file: Path, data: Data, state: Any, pipeline: Pipeline, processes: int) -> tuple[int, dict[str, Any]]:
    """The rows to a file, how many, and their account, if the data is in the state still that its key was made in."""
    report = _write(file, data, pipeline, processes)
    if data.state() != state:
        raise DataError(
            f"{data.name} has changed while it was read. Start again when nobody writes to it.", code="data.changed_while_read"
        )
    return report.kept, asdict(report)


def _write(file: Path, data: Data, pipeline: Pipeline, processes: int) -> DataReport:
    """The rows to a file, part by part."""
    reports = []
    with pyarrow.ipc.new_stream(str(file), pipeline.schema) as writer:
        for part in _shown(make_parts(pipeline, data.objects(), processes), data.name):
            writer.write_batch(part.rows)
            reports.append(part.report)
    return _report(data, reports, pipeline)


def _shown(parts: Iterator[RowBatch], name: str) -> Iterator[RowBatch]:
    """The parts; the samples in them are counted where progress is shown."""
    with progress.task(f"preparing {name}", unit="samples") as task:
        for part in parts:
            task.advance(part.report.samples)
            yield part


def _report(data: Data, parts: list[DataReport], pipeline: Pipeline) -> DataReport:
    """The account of a whole source.

    Raises:
        DataError: no samples in it, or nothing to train on.
    """
    empty = DataReport(file=data.name, template=pipeline.template.name, has_trained=False)
    report = total([empty, *parts])
    if report.samples == report.bad:
        if report.bad:
            raise DataError(
                f"{data.name} holds no samples but {report.bad:,} that can't be used, the first: {report.first_bad[0]}",
                code="data.all_samples_bad",
            )
        raise DataError(f"{data.name} holds no samples. Expected {EXPECTED}.", code="data.no_samples")
    if report.kept and not report.has_trained:  # lazily tokenised: all were looked at, and stay in
        report = replace(report, kept=0, dropped={**report.dropped, CUT_OFF: report.kept})
    if not report.kept:
        raise DataError(_nothing_left(report, pipeline.model_max_length), code="data.nothing_left")
    return report


def _nothing_left(report: DataReport, model_max_length: int) -> str:
    message = f"{report.file}: no sample is left in which anything is trained on ({listed(report.dropped)})."
    if CUT_OFF in report.dropped:
        return f"{message} --model_max_length is {model_max_length}, and the shortest has {report.shortest} tokens: raise it."
    if TOO_LONG in report.dropped:
        return f"{message} --model_max_length is {model_max_length}: raise it, or take --overlong truncate or split."
    if report.bad:
        return f"{message} {report.bad:,} can't be used, the first: {report.first_bad[0]}"
    return f"{message} Only answers are trained on: give samples with answers."


def require_one_batch(prepared: PreparedDataset, *, world_size: int, per_device_batch_size: int) -> None:
    """Raise unless the samples, or the rows that they are packed into, fill one batch on every rank. Pure.

    Raises:
        DataError: fewer than `world_size * per_device_batch_size`.
    """
    needed = world_size * per_device_batch_size
    usable, tokens = len(prepared.rows), [report.tokens for report in prepared.reports]
    if usable < needed:
        files = ", ".join(report.file for report in prepared.reports)
        size = "" if None in tokens else f" ({counted(sum(filter(None, tokens)), 'token')})"
        there, remedy = counted(usable, "usable sample"), "or fewer ranks"
        if prepared.is_packed:
            there = f"{counted(len(prepared.samples), 'sample')} in {counted(usable, 'packed row')}"
            remedy = "fewer ranks, or leave --packing True out: then samples are padded"
        raise DataError(
            f"{files}: {there}{size}, and one batch needs {needed}: {per_device_batch_size} on each of "
            f"{counted(world_size, 'rank')}. Give more data, a smaller --per_device_train_batch_size, {remedy}.",
            code="data.too_few_samples",
        )
