"""Report the progress of long work to whatever display the program has set; without a display, nothing is done.

It works as `logging` does: the library says what it is doing, the program decides how that is shown (`job/progress.py`). So
the loader needs no library for it, and a call without a display costs one comparison. Left out: events that are sent from
other threads or processes to the display; a reading thread adds a number to a counter, and the display looks at it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")

BYTES = "bytes"
"""The unit that a display shows in MiB or GiB."""


class Task(Protocol):
    """Work under way. Its methods may be called from any thread."""

    def advance(self, amount: int = 1) -> None:
        """Add `amount` units to what has been done."""
        ...

    def note(self, text: str) -> None:
        """Replace the short text next to the numbers; it then stands for rate and time left."""
        ...

    def spoken(self) -> None:
        """A line about this task has just been logged by whoever does it."""
        ...


class Display(Protocol):
    """Shows tasks; several may be under way, one inside the other."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Show a task until the context ends."""
        ...

    def close(self) -> None:
        """Show nothing any more."""
        ...


class _Unseen:
    """A task that nobody looks at."""

    def advance(self, amount: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def spoken(self) -> None:
        return None


_UNSEEN = _Unseen()
_display: Display | None = None  # set by `set_display` alone


def set_display(display: Display | None) -> None:
    """Set where progress is shown in this process; None: nowhere. The program calls it, on rank 0."""
    global _display
    if _display is not None:
        _display.close()
    _display = display


@contextlib.contextmanager
def task(title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Show work under the name `title` while the body runs. Any rank; does not communicate.

    Args:
        title: what is done, in the words of the log: "reading the weights".
        total: how many units there are; None where it is not known.
        unit: `BYTES`, or the plural of what is counted ("samples"); empty where nothing is counted.
    """
    if _display is None:
        yield _UNSEEN
        return
    with _display.task(title, total, unit) as shown:
        yield shown


def counted(items: Sequence[T], title: str, unit: str) -> Iterator[T]:
    """The items one by one, as a task that has done each of them when the next one is asked for."""
    with task(title, len(items), unit) as work:
        for item in items:
            yield item
            work.advance()


def clock(seconds: float) -> str:
    """A duration for a person. Worked example: 5 → "0:05", 161 → "2:41", 3723 → "1:02:03", 90000 → "1 d 1:00:00"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hour}:{minute:02}:{second:02}"


def size(nbytes: float) -> str:
    """A number of bytes for a person. Worked example: 1536 → "1.5 KiB", 13 * 2**30 → "13.0 GiB"."""
    if nbytes < 2**10:
        return f"{nbytes:.0f} B"
    power = 1 if nbytes < 2**20 else 2 if nbytes < 2**30 else 3
    return f"{nbytes / 2 ** (10 * power):,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
