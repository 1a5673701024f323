"""Parts made side by side in processes of their own.

The processes are started anew (spawned), not forked: who calls this may have threads and a GPU already, and a fork would
inherit their locks. Tokenizers are told to keep to one thread in each of them. A process whose parent has died ends itself.
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

AT_ONCE = 500
"""Objects of a part."""

_FEW_PARTS = 8
"""So many are made sooner here than processes are started."""

_MOST = 16
"""Processes by default: one reader feeds no more."""

_pipeline: Pipeline | None = None
"""The pipeline of a worker process. `_start` sets it, and `TOKENIZERS_PARALLELISM`, when the process starts; both end with the
process. Elsewhere it stays None."""


def usable_processes() -> int:
    """How many processes this one may keep busy, at most `_MOST`."""
    return min(len(os.sched_getaffinity(0)), _MOST)


def make_parts(pipeline: Pipeline, objects: Iterable[tuple[Any, str]], processes: int) -> Iterator[RowBatch]:
    """The parts of a stream of objects, in their order. Any rank by itself; does not communicate.

    Never more than a few parts a process are in memory.

    Raises:
        DataError: as `Pipeline.part`, the first in the stream; or a process that has died.
    """
    batches = _batches(iter(objects))
    first = list(itertools.islice(batches, _FEW_PARTS))
    if processes < 2 or len(first) < _FEW_PARTS:
        return map(pipeline.part, itertools.chain(first, batches))
    return _side_by_side(pipeline, itertools.chain(first, batches), processes)


def _batches(objects: Iterator[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    while batch := list(itertools.islice(objects, AT_ONCE)):
        yield batch


def _side_by_side(pipeline: Pipeline, batches: Iterable[list[tuple[Any, str]]], processes: int) -> Iterator[RowBatch]:
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_start, initargs=(pipeline,))
    waiting: collections.deque[concurrent.futures.Future[RowBatch]] = collections.deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_part, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"one of {processes} processes that prepare the data has died, perhaps for lack of memory. Start fewer: "
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


def _part(batch: Sequence[tuple[Any, str]]) -> RowBatch:
    if _pipeline is None:
        raise RuntimeError("a worker process works before it was started")
    return _pipeline.part(batch)
