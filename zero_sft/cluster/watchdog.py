"""End a run whose ranks wait for a rank that is stuck, and say where each of them is.

A thread of each rank watches whether the rank finishes in time what it has begun. If not, every rank writes the stacks of its
Python threads to a file in the log folder. One of them reads these files, and reports which ranks are where.

Imports neither torch nor transformers.
"""

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from zero_sft.printable import first_of

LEAST_SECONDS = 120.0
"""The least time that a step has."""

MEDIANS = 10
"""A step has this many times the median time of the steps before it."""

FIRST_SECONDS = 1800.0
"""The time for each of the first steps, which may compile and allocate."""

_WRAPPERS = frozenset({"wrapped_fn", "wrapper", "inner", "decorate_context", "log_wrapper"})
"""Functions of libraries that only call another one."""

_STEADY = 3
"""The number of steps after which their median counts."""

GATHER_SECONDS = 4.0
"""Time for the other ranks to write their stacks, which they begin at about the same time."""


class StepTimes:
    """The times of the last steps, and the limit that follows from them. Pure apart from its list."""

    def __init__(self, fixed_limit: float | None = None) -> None:
        self._seconds: deque[float] = deque(maxlen=100)
        self._fixed = fixed_limit

    def add(self, seconds: float) -> None:
        """Add the time of a step."""
        self._seconds.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds after which a step is taken to be stuck."""
        if self._fixed is not None:
            return self._fixed
        if len(self._seconds) < _STEADY:
            return FIRST_SECONDS
        return max(LEAST_SECONDS, MEDIANS * statistics.median(self._seconds))


class Watchdog:
    """Watches this rank. Its methods do not communicate.

    Args:
        on_stuck: called in the watching thread with what has taken too long, and the limit in seconds; it ends the process.
        poll_seconds: how often the thread looks.
    """

    def __init__(self, on_stuck: Callable[[str, float], None], poll_seconds: float = 1.0) -> None:
        self._on_stuck, self._poll_seconds = on_stuck, poll_seconds
        self._what, self._limit, self._deadline = "", 0.0, float("inf")
        self._goes_on: Callable[[], bool] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="zero_sft-watchdog", daemon=True)
        self._thread.start()

    def expect(self, what: str, seconds: float, goes_on: Callable[[], bool] | None = None) -> None:
        """Begin something that has to be done within this time; what was expected before is done.

        Args:
            goes_on: called in the watching thread when the time is over; if it returns True, the time begins again.
        """
        with self._lock:
            self._what, self._limit, self._deadline = what, seconds, time.monotonic() + seconds
            self._goes_on = goes_on

    def done(self) -> None:
        """Expect nothing."""
        with self._lock:
            self._deadline = float("inf")

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._poll_seconds):
            with self._lock:
                what, limit, is_late = self._what, self._limit, time.monotonic() > self._deadline
                if is_late and self._goes_on is not None and self._goes_on():
                    self._deadline, is_late = time.monotonic() + limit, False
                elif is_late:
                    self._deadline = float("inf")
            if is_late:
                self._on_stuck(what, limit)


def stacks_file(folder: Path, rank: int) -> Path:
    """Return the file with the stacks of a rank."""
    return folder / f"stacks_rank_{rank}.txt"


def write_stacks(folder: Path, rank: int, what: str) -> None:
    """Write the stacks of all Python threads of this rank. The first line tells where the main thread is."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with stacks_file(folder, rank).open("w", encoding="utf-8") as file:
            file.write(f"{place_of_main_thread()}\nrank {rank} on {socket.gethostname()}, process {os.getpid()}, {what}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def place_of_main_thread() -> str:
    """Return the function in which the main thread is, with its file and line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "an unknown place"
    stack = [each for each in traceback.extract_stack(frame) if each.name not in _WRAPPERS]
    last = stack[-1]
    return f"{last.name} ({'/'.join(Path(last.filename).parts[-3:])}, line {last.lineno})"


def places(folder: Path, ranks: Sequence[int], since: float) -> dict[str, list[int]]:
    """Return the ranks at each place, by their files, the fewest first. The place of a rank without a new file is unknown.

    Args:
        since: seconds since 1970; an older file is of an earlier run.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        place = "an unknown place (it wrote no stacks)"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            path = stacks_file(folder, rank)
            if path.stat().st_mtime >= since:
                with path.open(encoding="utf-8") as file:
                    place = file.readline().strip()
        found[place].append(rank)
    return dict(sorted(found.items(), key=lambda item: len(item[1])))


def describe_places(found: dict[str, list[int]]) -> str:
    """Say which ranks are where, in one sentence for each place."""
    parts = [f"rank {first_of(ranks, 8)} {'is' if len(ranks) == 1 else 'are'} in {place}" for place, ranks in found.items()]
    return first_of(parts, 4, separator="; ")
