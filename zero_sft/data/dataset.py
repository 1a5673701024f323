"""Prepare the trainer's dataset of token ids and labels, and a report on the data. Nothing here communicates.

By default all samples are tokenised at the start, and samples without a token to train on are left out. With `lazy`, a sample
is rendered and tokenised each time it is needed, and the result is not kept. Then a sample that is cut off before its first
answer stays in the dataset, without labels. The rows are memory-mapped from a file in the cache folder.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from zero_sft.console import progress
from zero_sft.data import cache
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.report import CUT_OFF, TOO_LONG, DataReport, list_counts, total
from zero_sft.data.samples.embedded_tokens import require_ids
from zero_sft.data.samples.sample_formats import EXPECTED
from zero_sft.data.sources.data_path import DataSource
from zero_sft.data.workers import make_batches
from zero_sft.errors import DataError
from zero_sft.printable import with_count

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_WARNING_SHARE = 0.05
"""The share of unusable samples above which a warning says that something may be wrong with the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDataset:
    """The samples, and the rows that are trained on: packed samples, or the samples themselves.

    `samples` has the columns `input_ids`, `labels` and, unless lazy, `length` and `place`. Packed `rows` have `seq_lengths`
    instead of these two. `reports` has one report per source, `notes` describe the mixture, and `source_rows` has the number of
    samples of each source in it. `packing_note` tells how full the rows are; it is empty without packing. `transform` tokenises
    the rows of a lazy dataset. `keys` are the cache keys of the sources' rows.
    """

    samples: "datasets.Dataset"
    rows: "datasets.Dataset"
    reports: tuple[DataReport, ...]
    notes: tuple[str, ...] = ()
    source_rows: tuple[int, ...] = ()
    packing_note: str = ""
    transform: Pipeline | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        """Whether the rows are packed, so that one may hold several samples."""
        return bool(self.packing_note)

    def unpacked(self) -> "PreparedDataset":
        """Return the same data without packing: the rows are the samples."""
        return replace(self, rows=self.samples, packing_note="")

    def lines(self) -> list[str]:
        """Return the reports and notes as lines for the log."""
        return [*(line for report in self.reports for line in report.lines()), *self.notes]

    def recent_samples(self) -> "datasets.Dataset":
        """Return the samples, among which those of a batch are looked for."""
        return self.samples

    def warnings(self) -> list[str]:
        """Return warnings, as lines, about data that looks wrong."""
        return warnings_of(self.reports)


def warnings_of(reports: Sequence[DataReport]) -> list[str]:
    """Return warnings, as lines, about data that looks wrong according to the reports on its sources."""
    warnings = []
    for report in reports:
        if report.bad > _WARNING_SHARE * report.samples:
            warnings.append(f"{report.file}: {report.bad / report.samples:.0%} of the samples are bad and were skipped")
        if report.samples > report.bad and not report.kept:
            warnings.append(f"{report.file}: no sample with anything to train on ({list_counts(report.dropped)})")
        elif report.untrained_share > _WARNING_SHARE:
            share = f"{report.untrained_share:.0%} of the {'usable ' if report.bad else ''}samples"
            warnings.append(f"{report.file}: nothing is trained on in {share} ({list_counts(report.untrained)})")
        if report.thoughts and report.dropped_thoughts == report.thoughts:
            warnings.append(
                f"{report.file}: the template {report.template} leaves out the thoughts of all {report.thoughts:,} answers "
                "that have some, so they are not trained on"
            )
    return warnings


def prepare_source(data: DataSource, pipeline: Pipeline, root: Path, *, processes: int = 1) -> PreparedDataset:
    """Read, render, tokenise and label a source of samples, or find its rows in the cache. Any rank; does not communicate.

    Args:
        data: a file, a folder, or a dataset on the hub.
        root: the cache folder.
        processes: the number of worker processes, used if there is enough data.

    Raises:
        DataError: an unusable file, a template whose answers can't be located, or nothing left to train on.
    """
    data.require_outside(root, option="--data_cache_dir", code="data.cache_inside_data")
    state = data.state()
    key = cache.key_of_rows(data, pipeline)
    start = time.monotonic()
    dataset, summary, existed = cache.find_or_store(root, key, lambda file: _write_rows(file, data, state, pipeline, processes))
    if existed:
        logger.info("  prepared before, in %s", root / key)
    else:
        logger.info("  prepared in %.0f s, kept in %s", time.monotonic() - start, root / key)
    prepared = dataset_of_entry(dataset, summary, root / key, data, pipeline)
    chosen = data.chosen()
    (report,) = prepared.reports
    return replace(prepared, reports=(replace(report, left_out=chosen.left_out, note=chosen.note),))


def dataset_of_entry(
    dataset: "datasets.Dataset", summary: Mapping[str, Any], entry: Path, data: DataSource, pipeline: Pipeline
) -> PreparedDataset:
    """Make the prepared dataset of a cache entry; its report gets this run's names of the source and the template.

    The source is not looked at, since many ranks do this at the same time.
    """
    try:
        report = DataReport(**{**summary, **{name: tuple(summary[name]) for name in ("formats", "first_bad")}})
    except (TypeError, LookupError) as error:
        raise DataError(
            f"{entry} is damaged: {error}. Delete that folder; the next run prepares the data again.",
            code="data.cache_entry_damaged",
        ) from error
    if report.highest_id is not None:  # the rows may have been prepared for another model
        require_ids([report.highest_id], pipeline.embedding_rows, data.name)
    report = replace(
        report,
        file=data.name,
        template=pipeline.template.name,
        # the file may have moved
        first_bad=tuple(message.replace(report.file, data.name, 1) for message in report.first_bad),
        dropped_places={
            reason: [place.replace(report.file, data.name, 1) for place in places]
            for reason, places in report.dropped_places.items()
        },
    )
    transform = pipeline if pipeline.lazy else None
    samples = dataset.with_transform(pipeline) if transform else dataset
    return PreparedDataset(samples=samples, rows=samples, reports=(report,), transform=transform, keys=[entry.name])


def _write_rows(file: Path, data: DataSource, state: Any, pipeline: Pipeline, processes: int) -> tuple[int, dict[str, Any]]:
    """Write the rows of a cache entry, batch by batch, and return their number and their summary.

    `state` is that of the data when its key was computed.
    """
    reports = []
    with pyarrow.ipc.new_stream(str(file), pipeline.schema) as writer:
        with progress.task(f"preparing {data.name}", unit="samples") as task:
            for batch in make_batches(pipeline, data.objects(), processes):
                task.advance(batch.report.samples)
                writer.write_batch(batch.rows)
                reports.append(batch.report)
    report = report_of_source(data, reports, pipeline.model_max_length)
    if data.state() != state:
        raise changed_error(data)
    return report.kept, asdict(report)


def changed_error(data: DataSource) -> DataError:
    """Make the error for data that was written to while it was read."""
    return DataError(
        f"{data.name} changed while it was read. Start again when no other process writes to it.",
        code="data.changed_while_read",
    )


def report_of_source(data: DataSource, reports: list[DataReport], model_max_length: int) -> DataReport:
    """Sum the batches' reports into the report of the source; raise `DataError` if there is nothing to train on."""
    report = total([DataReport(file=data.name), *reports])
    if report.samples == report.bad:
        if report.bad:
            raise DataError(
                f"{data.name} contains no samples but {with_count(report.bad, 'unusable one')}, "
                f"the first: {report.first_bad[0]}",
                code="data.all_samples_bad",
            )
        raise DataError(f"{data.name} contains no samples. Expected {EXPECTED}.", code="data.no_samples")
    if report.kept and not report.has_trained:  # lazy: all samples were tokenised as a check, none has trained tokens
        report = replace(report, kept=0, dropped={**report.dropped, CUT_OFF: report.kept})
    if not report.kept:
        raise DataError(_nothing_left(report, model_max_length), code="data.nothing_left")
    return report


def _nothing_left(report: DataReport, model_max_length: int) -> str:
    message = f"{report.file}: no sample with anything to train on is left ({list_counts(report.dropped)})."
    if CUT_OFF in report.dropped:
        return f"{message} --model_max_length is {model_max_length}, and the shortest has {report.shortest} tokens: raise it."
    if TOO_LONG in report.dropped:
        return f"{message} --model_max_length is {model_max_length}: raise it, or use --overlong truncate or split."
    if report.bad:
        return f"{message} {with_count(report.bad, 'sample')} can't be used, the first: {report.first_bad[0]}"
    return f"{message} Only answers are trained on: provide samples with answers."


def require_one_batch(prepared: PreparedDataset, *, world_size: int, per_device_batch_size: int) -> None:
    """Check that the rows fill at least one batch on every rank. Pure.

    Raises:
        DataError: fewer than `world_size * per_device_batch_size`.
    """
    needed = world_size * per_device_batch_size
    usable, tokens = len(prepared.rows), [report.tokens for report in prepared.reports]
    if usable < needed:
        files = ", ".join(report.file for report in prepared.reports)
        size = "" if None in tokens else f" ({with_count(sum(filter(None, tokens)), 'token')})"
        available, remedy = with_count(usable, "usable sample"), "or fewer ranks"
        if prepared.is_packed:
            available = f"{with_count(len(prepared.samples), 'sample')} in {with_count(usable, 'packed row')}"
            remedy = "fewer ranks, or leave out --packing True, so that samples are padded"
        raise DataError(
            f"{files}: {available}{size}, but one batch needs {needed}: {per_device_batch_size} on each of "
            f"{with_count(world_size, 'rank')}. Use more data, a smaller --per_device_train_batch_size, {remedy}.",
            code="data.too_few_samples",
        )
