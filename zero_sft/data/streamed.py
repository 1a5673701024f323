"""The rows of a stream as a dataset of known length, made in the background while the model is trained on them.

A run with `--streaming` has `max_steps` steps, so it needs a known number of rows. The Trainer takes them one after the other
(`train_sampling_strategy` "sequential"), each rank its own. So all that the Trainer does with a dataset works with a stream as
well: sharding batches over ranks, and going on at a row after a resume. The first rank of each node makes the blocks, with
worker processes, and hands them to the others (`spool`).
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.dataset import report_of_source, warnings_of
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.report import DataReport
from zero_sft.data.sources.data_path import DataSource
from zero_sft.data.spool import Spool, shared
from zero_sft.data.stream import Block, Stream, StreamState
from zero_sft.data.tokenize import WEIGHTS
from zero_sft.data.workers import BATCH_OBJECTS

logger = logging.getLogger(__name__)

KEPT_STEPS = 4
"""Blocks are kept for this many steps after their last row: for ranks that are a step behind, and for the places of samples."""

_POLL_SECONDS = 0.2
_LONGEST_WAIT = 20  # seconds for the thread to end


class _Producer:
    """A thread that makes the blocks of a stream, one ahead of the one that is asked for."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks, self._stopped = blocks, threading.Event()
        self._made: queue.Queue[Block | BaseException] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="data stream", daemon=True)
        self._thread.start()

    def next(self) -> Block:
        """Wait for the next block and return it; raise the error of making it."""
        made = self._made.get()
        if isinstance(made, BaseException):
            self._put(made)  # for whoever asks again
            raise made
        return made

    def stop(self) -> None:
        """End the thread and its processes."""
        self._stopped.set()
        self._thread.join(_LONGEST_WAIT)

    def _run(self) -> None:
        try:
            for block in self._blocks:
                if not self._put(block):
                    return
        except BaseException as error:  # noqa: BLE001 - raised where the block is asked for
            self._put(error)
        finally:
            close: Any = getattr(self._blocks, "close", None)
            close()

    def _put(self, made: Block | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._made.put(made, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


class _Taker:
    """Takes the blocks of a stream when they are asked for."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks

    def next(self) -> Block:
        """Return the next block."""
        return next(self._blocks)

    def stop(self) -> None:
        """Do nothing: nothing goes on."""


class StreamedRows(datasets.Dataset):
    """The first `length` rows of a stream as a dataset. Rows are asked for in ascending order; going back opens it again.

    Any rank; nothing here communicates.

    Args:
        open_stream: opens the stream at a state.
        length: in rows.
        rows_a_step: of all ranks. A row has weights if a row of its step may have some, so that all ranks agree.
        states: known states, from a checkpoint.
        on_pass: called with the number of a pass, from 0, and its reports when the first row after it is asked for.
        on_drop: called with each block that is no longer kept in memory.
        in_background: a thread takes the blocks, one ahead.
    """

    def __init__(
        self,
        open_stream: Callable[[StreamState], Iterator[Block]],
        *,
        length: int,
        rows_a_step: int,
        states: Sequence[StreamState] = (),
        on_pass: Callable[[int, Sequence[DataReport]], None] = lambda number, reports: None,
        on_drop: Callable[[Block], None] = lambda block: None,
        in_background: bool = True,
    ) -> None:
        super().__init__(pyarrow.table({"input_ids": pyarrow.array([[0, 0]]), "labels": pyarrow.array([[0, 0]])}))
        self._open, self._length, self._rows_a_step = open_stream, length, rows_a_step
        self._on_pass, self._on_drop, self._in_background = on_pass, on_drop, in_background
        self._states = sorted([StreamState(), *states], key=lambda state: state.row)  # and those of blocks that were made
        self._producer: _Producer | _Taker | None = None
        self._blocks: list[Block] = []
        self._ended: list[Block] = []  # the last blocks of passes whose rows are not yet all taken

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one row that stands for all. TRL looks at it for the names of the columns."""
        yield {"input_ids": [0, 0], "labels": [0, 0]}

    def __getitem__(self, key: Any) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """Return these rows; wait until they are made.

        Raises:
            DataError: a sample or file on the way to them can't be used.
        """
        return [self._row(int(key)) for key in keys]

    def begin_at(self, row: int) -> None:
        """Begin to make the blocks from the one with a row on."""
        self.close()
        state = [state for state in self._states if state.row <= row][-1]
        self._producer = (_Producer if self._in_background else _Taker)(self._open(state))

    def close(self) -> None:
        """End the thread that makes the blocks."""
        if self._producer is not None:
            self._producer.stop()
        self._producer, self._blocks, self._ended = None, [], []

    def states_at(self, row: int) -> list[StreamState]:
        """Return the states before the last two blocks that begin at or before a row, the newest last."""
        return [state for state in self._states if state.row <= row][-2:]

    def recent_samples(self) -> datasets.Dataset:
        """Return the samples of the blocks in memory, with their places."""
        if not self._blocks:
            return datasets.Dataset(pyarrow.table({}))
        return datasets.Dataset(pyarrow.concat_tables([block.samples for block in self._blocks]))

    def _row(self, index: int) -> dict[str, Any]:
        while self._ended and index >= self._ended[0].stop:
            block = self._ended.pop(0)
            self._on_pass(block.start.pass_number, block.reports)
        step = index // self._rows_a_step
        first, stop = step * self._rows_a_step, (step + 1) * self._rows_a_step
        self._make(index, stop, keep_from=first - KEPT_STEPS * self._rows_a_step)
        of_step = [block for block in self._blocks if block.start.row < stop and block.stop > first]
        block = next(block for block in of_step if block.start.row <= index < block.stop)
        row: dict[str, Any] = block.rows.slice(index - block.start.row, 1).to_pylist()[0]
        if any(WEIGHTS in each.rows.column_names for each in of_step):
            row.setdefault(WEIGHTS, [1.0] * len(row["input_ids"]))
        return row

    def _make(self, index: int, stop: int, *, keep_from: int) -> None:
        """Make the blocks with the row `index` and those after it up to the row `stop`."""
        while True:
            if self._producer is None or (self._blocks and index < self._blocks[0].start.row):
                self.begin_at(index)
            if self._blocks and self._blocks[-1].stop >= stop:
                return
            assert self._producer is not None
            block = self._producer.next()
            for dropped in (each for each in self._blocks if each.stop <= keep_from):
                self._on_drop(dropped)
            self._blocks = [*(each for each in self._blocks if each.stop > keep_from), block]
            if block.start.row > self._states[-1].row:
                self._states.append(block.start)
            if block.reports:
                self._ended.append(block)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedData:
    """Training data that is streamed; the counterpart of `PreparedDataset`. `reports` are those on the first samples.

    `spool` is that of this rank, if it makes blocks for other ranks.
    """

    rows: StreamedRows
    spool: Spool | None = None
    is_packed: bool
    reports: tuple[DataReport, ...]
    keys: list[str] = field(default_factory=list)

    def recent_samples(self) -> datasets.Dataset:
        """Return the samples in memory, among which those of a batch are looked for."""
        return self.rows.recent_samples()

    def close(self) -> None:
        """End the making of rows, and remove what it wrote."""
        self.rows.close()
        if self.spool is not None:
            self.spool.close()


def stream_data(
    spec: DatasetSpec,
    pipeline: Pipeline,
    world: World,
    *,
    length: int,
    rows_a_step: int,
    shuffle: bool,
    states: Sequence[StreamState],
    begin_at: int,
) -> StreamedData:
    """Check the first samples of each source, and begin to make the rows of a stream. Every rank; communicates.

    Args:
        length, rows_a_step, states: see `StreamedRows`.
        shuffle: see `Stream`.
        begin_at: the row that is trained on first.

    Raises:
        DataError: the first samples can't be used.
    """
    with collective_stage(world, "reading the first samples") as exchange:
        if world.is_main:
            exchange.local = tuple(asdict(_first_report(source.data, pipeline)) for source in spec.sources)
    reports = tuple(DataReport(**values) for values in exchange.gathered[0])

    def on_pass(number: int, reports: Sequence[DataReport]) -> None:
        if world.is_main:
            logger.info("the training data was read to its end, in pass %d", number + 1)
        if world.is_main and number == 0 and begin_at == 0:  # else a part of the pass was not counted
            named = [replace(report, template=pipeline.template.name) for report in reports]
            for line in (line for report in named for line in report.lines()):
                logger.info("  %s", line)
            for warning in warnings_of(named):
                logger.warning(warning)

    own, visible = _open_spool(world)

    def open_stream(state: StreamState) -> Iterator[Block]:
        if visible is not None:
            return visible.read(state)
        blocks = iter(Stream(spec, pipeline, processes=spec.processes, shuffle=shuffle, state=state))
        return blocks if own is None else shared(blocks, own, state.row)

    rows = StreamedRows(
        open_stream,
        length=length,
        rows_a_step=rows_a_step,
        states=states,
        on_pass=on_pass,
        on_drop=own.remove if own is not None else lambda block: None,
        in_background=visible is None,  # else the writer is ahead
    )
    rows.begin_at(begin_at)
    return StreamedData(rows=rows, spool=own, is_packed=spec.pack, reports=reports)


def _open_spool(world: World) -> tuple[Spool | None, Spool | None]:
    """Make a spool on each node with several ranks. Every rank; communicates.

    Returns:
        The spool that this rank writes to, and the one that it reads from. A rank that does not see the spool of its node, such
        as one in another container, has neither.
    """
    has_others = world.node_leaders.count(world.node_leader) > 1
    with collective_stage(world, "opening the data stream") as exchange:
        own = Spool.create() if world.leads_node and has_others else None
        exchange.local = None if own is None else str(own.folder)
    folder = exchange.gathered[world.node_leader]
    visible = Spool(Path(folder)) if own is None and folder is not None else None
    return own, visible if visible is not None and visible.is_visible() else None


def _first_report(data: DataSource, pipeline: Pipeline) -> DataReport:
    """Return the report on the first samples of a source; raise `DataError` if they can't be used."""
    objects = list(itertools.islice(data.objects(streaming=True), BATCH_OBJECTS))
    report = pipeline.make_rows(objects).report
    if not objects:
        return report_of_source(data, [report], pipeline.model_max_length)
    return replace(report, file=f"{data.name}, the beginning", template=pipeline.template.name)
