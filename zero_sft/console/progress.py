"""Report the progress of long tasks to the display that the program has set, if any.

It works like `logging`: the library reports, the program decides how to show it (`console/bars.py`). So the loader needs no
library for it, and without a display a task is only a counter. Reading threads add to the counter, and the display reads it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")

BYTES = "bytes"
"""Unit that a display shows as KiB, MiB or GiB."""


class Task:
    """A task in progress: its title, the amount done, and its start time. Any thread may call its methods."""

    def __init__(self, title: str, total: int | None, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.text = 0, ""
        self._now, self._lock = now, threading.Lock()
        self.start = now()

    def advance(self, amount: int = 1) -> None:
        """Add `amount` units to the amount done."""
        with self._lock:
            self.done += amount

    def note(self, text: str) -> None:
        """Show a short text next to the amount, in place of the rate and the time left."""
        self.text = text

    def line_logged(self) -> None:
        """Report that the caller has just logged a line about this task; only log lines of progress depend on it."""

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


class Display(Protocol):
    """Display of tasks, several of which may be nested."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Show a task until the context ends."""
        ...

    def close(self) -> None:
        """Stop showing tasks."""
        ...


_display: Display | None = None  # only `set_display` sets it


def set_display(display: Display | None) -> None:
    """Set the display of this process, or None for no display. The program calls it on rank 0."""
    global _display
    if _display is not None:
        _display.close()
    _display = display


def task(title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
    """Show a task until the context ends. Any rank; does not communicate.

    Args:
        title: a description in the words of the log, such as "reading the weights".
        total: the number of units; None if unknown.
        unit: `BYTES`, or a plural noun ("samples"); empty if nothing is counted.
    """
    return contextlib.nullcontext(Task(title, total, unit)) if _display is None else _display.task(title, total, unit)


def iterate_with_progress(items: Sequence[T], title: str, unit: str) -> Iterator[T]:
    """Yield the items, and show a task that advances by one whenever the next item is requested."""
    with task(title, len(items), unit) as work:
        for item in items:
            yield item
            work.advance()


def format_duration(seconds: float) -> str:
    """Format a duration. Worked example: 5 → "0:05", 161 → "2:41", 3723 → "1:02:03", 90000 → "1 d 1:00:00"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hour}:{minute:02}:{second:02}"


def format_bytes(nbytes: float) -> str:
    """Format a number of bytes. Worked example: 1536 → "1.5 KiB", 13 * 2**30 → "13.0 GiB"."""
    if nbytes < 2**10:
        return f"{nbytes:.0f} B"
    power = 1 if nbytes < 2**20 else 2 if nbytes < 2**30 else 3
    return f"{nbytes / 2 ** (10 * power):,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
