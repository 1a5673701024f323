"""Make the rows of a dataset block by block while it is trained on, in an order that can be taken up at any block.

The stream goes through its sources again and again; each time is a pass. The samples of a pass are in the order of
`data.mixture`: one source after the other, or drawn by weights. A block is made of the next samples of a pass, as many as are
packed together. Whatever changes their order (packing, shuffling) stays inside the block, so the state before a block is a few
numbers. The order of the rows depends neither on the number of ranks nor on that of processes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow

from zero_sft.data.dataset import changed_error, report_of_source
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.packing import pack_table, samples_packed_together
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.report import DataReport, total
from zero_sft.data.sources.data_path import DataSource
from zero_sft.data.tokenize import WEIGHTS
from zero_sft.data.workers import BATCH_OBJECTS, make_batches

DRAWS_AT_ONCE = 1000
"""The number of sources that `datasets.interleave_datasets` draws at once, and so its order depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePosition:
    """The progress in a source: `objects`, in whole batches, then `rows` of the next batch; `exhausted` before in this pass."""

    objects: int = 0
    rows: int = 0
    exhausted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """The place in a stream before a block.

    `row`: the number of rows before it, in all passes. `pass_number` and `block` count from 0, `draws` are those of sources in
    this pass, and `sources` are the positions of the sources.
    """

    row: int = 0
    pass_number: int = 0
    block: int = 0
    draws: int = 0
    sources: tuple[SourcePosition, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StreamState":
        """Make a state of the values of `to_json`."""
        return cls(**{**values, "sources": tuple(SourcePosition(**each) for each in values["sources"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The rows of a block, in the order in which they are trained on.

    `rows` has the columns `input_ids` and `labels`, `weights` if a row has some, and `seq_lengths` of packed samples.
    `samples` are those that the rows were made of, with their places. `reports`, of a pass's last block, are those on the
    sources in that pass.
    """

    rows: pyarrow.Table
    samples: pyarrow.Table
    start: StreamState
    reports: tuple[DataReport, ...] = ()

    @property
    def stop(self) -> int:
        """The number of rows in the stream up to the block's end."""
        return self.start.row + self.rows.num_rows


@dataclass(kw_only=True)
class _Reader:
    """A source that is read from a position on, row by row, and the reports on what was read of it."""

    data: DataSource
    pipeline: Pipeline
    processes: int
    position: SourcePosition
    reports: list[DataReport] = field(default_factory=list)
    state: Any = None
    _batches: Iterator[Any] | None = None
    _batch: pyarrow.RecordBatch | None = None

    def take(self, count: int) -> pyarrow.RecordBatch | None:
        """Return the next rows, at most `count`; None at the end of the source."""
        if self.at_end():
            return None
        assert self._batch is not None
        taken = self._batch.slice(self.position.rows, count)
        self.position = replace(self.position, rows=self.position.rows + taken.num_rows)
        return taken

    def at_end(self) -> bool:
        """Whether there is no further row; reads the next batches if there are no rows in memory."""
        if self._batches is None:
            self.state = self.data.state_of_local_files()
            objects = self.data.objects(start=self.position.objects, streaming=True)
            self._batches = iter(make_batches(self.pipeline, objects, self.processes))
            self._batch = None
        while self._batch is None or self.position.rows >= self._batch.num_rows:
            made = next(self._batches, None)
            if made is None:
                return True
            if self._batch is not None:
                self.position = replace(self.position, objects=self.position.objects + BATCH_OBJECTS, rows=0)
            self._batch = made.rows
            if not self.position.exhausted:  # else it is read again in the same pass
                self.reports.append(made.report)
            if len(self.reports) > DRAWS_AT_ONCE:
                self.reports = [total(self.reports)]
        return False

    def require_unchanged(self) -> None:
        """Raise `DataError` if the files that are read were written to since reading began."""
        if self._batches is not None and self.data.state_of_local_files() != self.state:
            raise changed_error(self.data)

    def begin_again(self, *, exhausted: bool) -> None:
        """Go back to the beginning of the source."""
        self.close()
        self.position = SourcePosition(exhausted=exhausted)

    def close(self) -> None:
        """End the processes that make the rows."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = self._batch = None


class Stream:
    """The blocks of a stream from a state on, without an end.

    Args:
        spec: its sources, length, seed and packing.
        processes: the number of worker processes for each source that is read at the same time.
        shuffle: the rows of a block are in random order, by the spec's seed; else in the order of the samples.
        state: the place to begin at; by default the beginning.
    """

    def __init__(
        self, spec: DatasetSpec, pipeline: Pipeline, *, processes: int = 1, shuffle: bool, state: StreamState | None = None
    ) -> None:
        self._spec, self._shuffle = spec, shuffle
        sources = (state and state.sources) or (SourcePosition(),) * len(spec.sources)
        self._state = replace(state or StreamState(), sources=sources)
        weights = [source.weight for source in spec.sources if source.weight is not None]
        self._probabilities = [weight / sum(weights) for weight in weights]
        at_a_time = len(weights) or 1
        self._readers = [
            _Reader(data=source.data, pipeline=pipeline, processes=max(1, processes // at_a_time), position=position)
            for source, position in zip(spec.sources, sources, strict=True)
        ]

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks.

        Raises:
            DataError: a bad sample, an unreadable file; a source without anything to train on.
        """
        try:
            while True:
                yield from self._pass()
                self._state = replace(self._state, pass_number=self._state.pass_number + 1, block=0, draws=0)
                for reader in self._readers:
                    reader.begin_again(exhausted=False)
        finally:
            for reader in self._readers:
                reader.close()

    def _pass(self) -> Iterator[Block]:
        """Yield the blocks up to the end of the pass."""
        slices = self._drawn() if self._probabilities else self._in_turn()
        size = samples_packed_together(self._spec.model_max_length)
        ended = False
        while not ended:
            start = self._here()
            taken: list[pyarrow.RecordBatch] = []
            count = 0
            while count < size:
                self._wanted = size - count
                part = next(slices, None)
                if part is None:
                    ended = True
                    break
                taken.append(part)
                count += part.num_rows
            ended = ended or self._is_over()
            reports = self._reports() if ended else ()
            for reader in self._readers:
                reader.require_unchanged()
            if taken:
                block = self._block(pyarrow.Table.from_batches(taken).combine_chunks(), start)
                self._state = replace(self._state, row=block.stop, block=start.block + 1)
                yield replace(block, reports=reports)

    def _is_over(self) -> bool:
        """Whether there is no further sample in the pass."""
        readers = [reader for reader in self._readers if not reader.position.exhausted]
        return all(reader.at_end() for reader in readers) if not self._probabilities else not readers

    def _here(self) -> StreamState:
        return replace(self._state, sources=tuple(reader.position for reader in self._readers))

    def _in_turn(self) -> Iterator[pyarrow.RecordBatch]:
        """Yield the samples of one source after the other, at most `_wanted` at a time."""
        for reader in self._readers:
            while not reader.position.exhausted and (part := reader.take(self._wanted)) is not None:
                yield part
            reader.require_unchanged()
            reader.position = replace(reader.position, exhausted=True)
            reader.close()

    def _drawn(self) -> Iterator[pyarrow.RecordBatch]:
        """Yield samples of sources drawn by weight, one at a time, until each source was exhausted."""
        for number in _draws(self._probabilities, self._spec.seed, self._state.draws):
            if all(reader.position.exhausted for reader in self._readers):
                return
            reader = self._readers[number]
            part = reader.take(1)
            if part is None:  # the source is empty, or it ended in a batch without rows
                report_of_source(reader.data, reader.reports, self._spec.model_max_length)
                raise AssertionError(f"{reader.data.name} gave no row, but has some")
            self._state = replace(self._state, draws=self._state.draws + 1)
            if reader.at_end():
                reader.begin_again(exhausted=True)
            yield part

    def _reports(self) -> tuple[DataReport, ...]:
        """Return the reports on the sources in this pass; raise `DataError` if one has nothing to train on."""
        reports = []
        for reader in self._readers:
            if reader.reports:  # none after a pass that was taken up behind the source
                reports.append(report_of_source(reader.data, reader.reports, self._spec.model_max_length))
            reader.reports = []
        return tuple(reports)

    def _block(self, samples: pyarrow.Table, start: StreamState) -> Block:
        """Make the block of these samples: pack and shuffle them, if the spec says so."""
        columns = ["input_ids", "labels"]
        if samples.column(WEIGHTS).null_count < len(samples):
            columns.append(WEIGHTS)
        rows = samples.select(columns)
        if self._spec.pack:
            rows = pack_table(rows, self._spec.model_max_length)
        if self._shuffle:
            seed = [self._spec.seed, start.pass_number, start.block]
            rows = rows.take(np.random.default_rng(seed).permutation(len(rows)))
        return Block(rows=rows.combine_chunks(), samples=samples, start=start)


def _draws(probabilities: Sequence[float], seed: int, start: int) -> Iterator[int]:
    """Yield numbers of sources as `datasets.interleave_datasets` draws them, from draw `start` on."""
    generator = np.random.default_rng(seed)
    for first in itertools.count(step=DRAWS_AT_ONCE):
        drawn = generator.choice(len(probabilities), size=DRAWS_AT_ONCE, p=probabilities)
        if first + DRAWS_AT_ONCE > start:
            yield from drawn[max(0, start - first) :].tolist()
