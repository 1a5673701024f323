"""Report the progress of long tasks to the display that the program has set, if any.

It works like `logging`: the library reports, the program decides how to show it (`console/bars.py`). So the loader needs no
library for it, and without a display a call costs one comparison. Left out: events from other threads or processes. A reading
thread adds to a counter, which the display reads.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")

BYTES = "bytes"
"""Unit that a display shows as KiB, MiB or GiB."""


class Task(Protocol):
    """A task in progress. Any thread may call its methods."""

    def advance(self, amount: int = 1) -> None:
        """Add `amount` units to the amount done."""
        ...

    def note(self, text: str) -> None:
        """Show a short text next to the amount, in place of the rate and the time left."""
        ...

    def line_logged(self) -> None:
        """Report that the caller has just logged a line about this task."""
        ...


class Display(Protocol):
    """Display of tasks, several of which may be nested."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Show a task until the context ends."""
        ...

    def close(self) -> None:
        """Stop showing tasks."""
        ...


class _HiddenTask:
    """A task without a display."""

    def advance(self, amount: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def line_logged(self) -> None:
        return None


_HIDDEN_TASK = _HiddenTask()
_display: Display | None = None  # only `set_display` sets it


def set_display(display: Display | None) -> None:
    """Set the display of this process, or None for no display. The program calls it on rank 0."""
    global _display
    if _display is not None:
        _display.close()
    _display = display


@contextlib.contextmanager
def task(title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Show a task while the body runs. Any rank; does not communicate.

    Args:
        title: a description in the words of the log, such as "reading the weights".
        total: the number of units; None if unknown.
        unit: `BYTES`, or a plural noun ("samples"); empty if nothing is counted.
    """
    if _display is None:
        yield _HIDDEN_TASK
        return
    with _display.task(title, total, unit) as shown:
        yield shown


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
