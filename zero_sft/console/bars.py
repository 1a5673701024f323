"""Show progress: a bar for each task on a terminal (rich), else a plain line in the log now and then.

Only rank 0 shows anything. For loading and export its own bytes stand for those of all ranks, which have as many.
transformers', datasets' and TRL's tqdm bars were left out: they know one loop each, collide with log lines, and fill a log
file with a line a refresh.
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

from zero_sft.console.progress import BYTES, Display, clock, size

logger = logging.getLogger("zero_sft.console.progress")

SAY_EVERY_SECONDS = 30.0
"""In a log file: the shortest time between two lines of one task, if a tenth more is done by then."""

_SAY_AT_LEAST_SECONDS = 600.0
_BAR_WIDTH = 30
_REFRESHES_A_SECOND = 4.0


def display_for(stream: Any) -> Display:
    """Bars where `stream` is a terminal that can move its cursor, else lines in the log."""
    console = _Console(stderr=True, emoji=False)
    return Bars(console) if stream.isatty() and not console.is_dumb_terminal else Lines()


class Work:
    """A task's numbers: what it is, how much of it is done, since when.

    Any thread may call `advance`; it takes a lock for one addition.
    """

    def __init__(self, title: str, total: int | None, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.text = 0, ""
        self._now, self._lock = now, threading.Lock()
        self.start = now()

    def advance(self, amount: int = 1) -> None:
        """Add to what is done."""
        with self._lock:
            self.done += amount

    def note(self, text: str) -> None:
        """Replace the text next to the numbers. It then stands for rate and time left, which whoever sets it knows better."""
        self.text = text

    def spoken(self) -> None:
        """Nothing: bars stay where they are."""

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return self._now() - self.start

    def numbers(self) -> str:
        """What is done of how much, how fast, and the time left; nothing where nothing is counted."""
        done, total = min(self.done, self.total or self.done), self.total
        counted = self.unit == BYTES
        if total is not None:
            amount = f"{size(done)} of {size(total)}" if counted else f"{done:,} of {total:,} {self.unit}"
        elif done:
            amount = size(done) if counted else f"{done:,} {self.unit}"
        else:
            return ""
        if self.text or not done or self.seconds <= 0:
            return f"{amount}  {self.text}".rstrip()
        rate = done / self.seconds
        speed = f"{size(rate)}/s" if counted else f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"
        left = "" if total is None else f"  {clock((total - done) / rate)} left"
        return f"{amount}  {speed}{left}"


class Bars:
    """Bars at the bottom of a terminal; log lines appear above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._works: dict[Work, Spinner] = {}
        self._live: Live | None = None

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Work]:
        """Show a bar until the context ends."""
        work = Work(title, total, unit)
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
        """Take away the bars of tasks that an error has left behind."""
        self._works.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_above(self, text: str) -> bool:
        """Write a log line above the bars; False where there are none, or where the log is not on this terminal."""
        if self._live is None or not sys.stdout.isatty():
            return False
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for work, spinner in list(self._works.items()):
            if work.total is None:
                sign: Any = spinner
                numbers = work.numbers() or clock(work.seconds)
            else:
                sign = ProgressBar(total=max(work.total, 1), completed=min(work.done, work.total), width=_BAR_WIDTH)
                numbers = work.numbers()
            table.add_row(Text(work.title), sign, Text(numbers))
        return table


class Lines:
    """Plain lines in the log, where there is no terminal: none for what is done in half a minute."""

    def __init__(self, say_every_seconds: float = SAY_EVERY_SECONDS) -> None:
        self._every = say_every_seconds

    def close(self) -> None:
        """Nothing is left behind."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Work]:
        """Say how far a task is, now and then, until the context ends."""
        yield _SpokenWork(title, total, unit, self._every)


class _SpokenWork(Work):
    """A task that says how far it is when it advances, and some time and some work have passed since it last did."""

    def __init__(self, title: str, total: int | None, unit: str, every: float) -> None:
        super().__init__(title, total, unit)
        self._every, self._said_at, self._said_done = every, self.start, 0

    def advance(self, amount: int = 1) -> None:
        """Add to what is done, and say so if it is time."""
        super().advance(amount)
        silent = self._now() - self._said_at
        if silent < self._every:
            return
        with self._lock:
            more = self.total is None or self.done - self._said_done >= 0.1 * self.total
            ended = self.total is not None and self.done >= self.total  # the next line of the log shows it
            due = not ended and (more or silent >= _SAY_AT_LEAST_SECONDS) and self._now() - self._said_at >= self._every
            if due:
                self._said_at, self._said_done = self._now(), self.done
        if due:
            logger.info("%s: %s", self.title, self.numbers())

    def spoken(self) -> None:
        """The line that has been logged counts as one of this task's."""
        with self._lock:
            self._said_at, self._said_done = self._now(), self.done


class _Console(Console):
    """A console that leaves the cursor as it is, so that a killed job leaves it, too."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False
