"""Show progress: one bar per task on a terminal (rich), otherwise occasional log lines.

Only rank 0 shows progress. For loading and export it counts its own bytes, since every rank has about as many. Left out: the
tqdm bars of transformers, datasets and TRL. Each covers one loop only, collides with log lines, and adds a line to a log file
at every refresh.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from zero_sft.console.progress import BYTES, Display, format_bytes, format_duration

logger = logging.getLogger("zero_sft.console.progress")

SAY_EVERY_SECONDS = 30.0
"""Shortest time between two log lines of one task; by then another tenth of the task must be done."""

_SAY_AT_LEAST_SECONDS = 600.0
_BAR_WIDTH = 30
_REFRESHES_A_SECOND = 4.0


def display_for(stream: Any) -> Display:
    """Return `Bars` if `stream` is a terminal that can move its cursor, else `Lines`."""
    console = _Console(stderr=True, emoji=False)
    return Bars(console) if stream.isatty() and not console.is_dumb_terminal else Lines()


class TaskState:
    """State of a task: its title, the amount done, and its start time.

    Any thread may call `advance`, which takes a lock for one addition.
    """

    def __init__(self, title: str, total: int | None, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.text = 0, ""
        self._now, self._lock = now, threading.Lock()
        self.start = now()

    def advance(self, amount: int = 1) -> None:
        """Add `amount` to the amount done."""
        with self._lock:
            self.done += amount

    def note(self, text: str) -> None:
        """Show `text` next to the amount, in place of the rate and the time left."""
        self.text = text

    def line_logged(self) -> None:
        """Do nothing: log lines do not move the bars."""

    @property
    def seconds(self) -> float:
        """Seconds since the start of the task."""
        return self._now() - self.start

    def numbers(self) -> str:
        """Return the amount done, the rate and the time left as text; empty if nothing is counted."""
        done, total = min(self.done, self.total or self.done), self.total
        is_bytes = self.unit == BYTES
        if total is not None:
            amount = f"{format_bytes(done)} of {format_bytes(total)}" if is_bytes else f"{done:,} of {total:,} {self.unit}"
        elif done:
            amount = format_bytes(done) if is_bytes else f"{done:,} {self.unit}"
        else:
            return ""
        if self.text or not done or self.seconds <= 0:
            return f"{amount}  {self.text}".rstrip()
        rate = done / self.seconds
        speed = f"{format_bytes(rate)}/s" if is_bytes else f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"
        left = "" if total is None else f"  {format_duration((total - done) / rate)} left"
        return f"{amount}  {speed}{left}"


class Bars:
    """Progress bars at the bottom of a terminal, with log lines above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._works: dict[TaskState, Spinner] = {}
        self._live: Live | None = None

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[TaskState]:
        """Show a bar for a task until the context ends."""
        work = TaskState(title, total, unit)
        self._works[work] = Spinner("dots")
        if self._live is None:
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=_REFRESHES_A_SECOND,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        try:
            yield work
        finally:
            self._works.pop(work, None)
            if not self._works:
                self.close()

    def close(self) -> None:
        """Remove all bars, including those that an error has left behind."""
        self._works.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_above(self, text: str) -> bool:
        """Write a log line above the bars; return False if there are no bars or the log is not on this terminal."""
        if self._live is None or not sys.stdout.isatty():
            return False
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for work, spinner in list(self._works.items()):
            if work.total is None:
                indicator: Any = spinner
                numbers = work.numbers() or format_duration(work.seconds)
            else:
                indicator = ProgressBar(total=max(work.total, 1), completed=min(work.done, work.total), width=_BAR_WIDTH)
                numbers = work.numbers()
            table.add_row(Text(work.title), indicator, Text(numbers))
        return table


class Lines:
    """Log lines for an output that is not a terminal; a task of less than half a minute logs nothing."""

    def __init__(self, say_every_seconds: float = SAY_EVERY_SECONDS) -> None:
        self._every = say_every_seconds

    def close(self) -> None:
        """Do nothing: log lines leave nothing to remove."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[TaskState]:
        """Log the progress of a task occasionally until the context ends."""
        yield _LoggedWork(title, total, unit, self._every)


class _LoggedWork(TaskState):
    """A task that logs its progress as it advances, once enough time and work have passed since the last line."""

    def __init__(self, title: str, total: int | None, unit: str, every: float) -> None:
        super().__init__(title, total, unit)
        self._every, self._said_at, self._said_done = every, self.start, 0

    def advance(self, amount: int = 1) -> None:
        """Add `amount` to the amount done, and log the progress if a line is due."""
        super().advance(amount)
        silent_seconds = self._now() - self._said_at
        if silent_seconds < self._every:
            return
        with self._lock:
            has_advanced = self.total is None or self.done - self._said_done >= 0.1 * self.total
            has_ended = self.total is not None and self.done >= self.total  # the next log line shows it
            has_waited = self._now() - self._said_at >= self._every  # again: another thread may have logged a line
            is_due = has_waited and not has_ended and (has_advanced or silent_seconds >= _SAY_AT_LEAST_SECONDS)
            if is_due:
                self._said_at, self._said_done = self._now(), self.done
        if is_due:
            logger.info("%s: %s", self.title, self.numbers())

    def line_logged(self) -> None:
        """Count a line that the caller has logged as a line of this task."""
        with self._lock:
            self._said_at, self._said_done = self._now(), self.done


class _Console(Console):
    """A console that never hides the cursor, so that it stays visible if the job is killed."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False
