"""Show progress: one bar per task on a terminal (rich), otherwise occasional log lines.

Only rank 0 shows progress. For loading and export it counts its own bytes, since every rank has about as many. The
tqdm bars of transformers, datasets and TRL are off: each covers one loop only, collides with log lines, and adds a line to a
log file at every refresh.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from zero_sft.console.progress import Display, Task, format_duration

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


class Bars:
    """Progress bars at the bottom of a terminal, with log lines above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[Task, Spinner] = {}
        self._live: Live | None = None

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        """Show a bar for a task until the context ends."""
        task = Task(title, total, unit)
        self._tasks[task] = Spinner("dots")
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
            yield task
        finally:
            self._tasks.pop(task, None)
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Remove all bars, including those that an error has left behind."""
        self._tasks.clear()
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
        for task, spinner in list(self._tasks.items()):
            if task.total is None:
                indicator: Any = spinner
                numbers = task.numbers() or format_duration(task.seconds)
            else:
                indicator = ProgressBar(total=max(task.total, 1), completed=min(task.done, task.total), width=_BAR_WIDTH)
                numbers = task.numbers()
            table.add_row(Text(task.title), indicator, Text(numbers))
        return table


class Lines:
    """Log lines for an output that is not a terminal; a task of less than half a minute logs nothing."""

    def close(self) -> None:
        """Do nothing: log lines leave nothing to remove."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Log the progress of a task occasionally until the context ends."""
        return contextlib.nullcontext(_LoggedTask(title, total, unit))


class _LoggedTask(Task):
    """A task that logs its progress as it advances, once enough time and work have passed since the last line."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        super().__init__(title, total, unit)
        self._said_at, self._said_done = self.start, 0

    def advance(self, amount: int = 1) -> None:
        """Add `amount` to the amount done, and log the progress if a line is due."""
        super().advance(amount)
        silent_seconds = self._now() - self._said_at
        if silent_seconds < SAY_EVERY_SECONDS:
            return
        with self._lock:
            has_advanced = self.total is None or self.done - self._said_done >= 0.1 * self.total
            has_ended = self.total is not None and self.done >= self.total  # the next log line shows it
            has_waited = self._now() - self._said_at >= SAY_EVERY_SECONDS  # again: another thread may have logged a line
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
