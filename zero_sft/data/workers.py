"""Turn objects into batches of rows in parallel worker processes.

The processes are spawned, not forked: the caller may already use threads and a GPU, and a fork would inherit their locks. In
each process, tokenizers use a single thread. A process ends itself when its parent dies.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from zero_sft.data.pipeline import Pipeline, RowBatch
from zero_sft.errors import DataError

BATCH_OBJECTS = 500
"""The number of objects in a batch."""

_MIN_PARALLEL_BATCHES = 8
"""Below this number of batches, starting processes takes longer than it saves."""

_MAX_PROCESSES = 16
"""The default limit of processes; one reader can't feed more."""

_pipeline: Pipeline | None = None
"""The pipeline of a worker process. `_start` sets it, and `TOKENIZERS_PARALLELISM`, when the process starts; both last until
the process ends. In other processes it stays None."""


def usable_processes() -> int:
    """The number of processes that the available CPU cores can keep busy, at most `_MAX_PROCESSES`."""
    return min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)


def make_batches(pipeline: Pipeline, objects: Iterable[tuple[Any, str]], processes: int) -> Iterator[RowBatch]:
    """Turn a stream of objects into batches of rows, in order, with a few batches per process in memory. Any rank.

    Raises:
        DataError: the first error in the stream, as `Pipeline.make_rows` raises it; or a process has died.
    """
    stream = iter(objects)
    batches = iter(lambda: list(itertools.islice(stream, BATCH_OBJECTS)), [])
    first = list(itertools.islice(batches, _MIN_PARALLEL_BATCHES))
    if processes < 2 or len(first) < _MIN_PARALLEL_BATCHES:
        return map(pipeline.make_rows, itertools.chain(first, batches))
    return _side_by_side(pipeline, itertools.chain(first, batches), processes)


def _side_by_side(pipeline: Pipeline, batches: Iterable[list[tuple[Any, str]]], processes: int) -> Iterator[RowBatch]:
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_start, initargs=(pipeline,))
    waiting: collections.deque[concurrent.futures.Future[RowBatch]] = collections.deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_make_rows, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"one of the {processes} processes that prepare the data has died, perhaps for lack of memory. Start fewer with "
            "--dataset_num_proc.",
            code="data.worker_died",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(pipeline: Pipeline) -> None:
    global _pipeline
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _pipeline = pipeline


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_rows(batch: Sequence[tuple[Any, str]]) -> RowBatch:
    if _pipeline is None:
        raise RuntimeError("a worker process got a batch before `_start` set its pipeline")
    return _pipeline.make_rows(batch)
