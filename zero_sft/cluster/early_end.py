"""A request to end the run early, with a checkpoint: a signal is kept until the ranks can agree on the step.

While `deferring` is open, the first signal is only recorded; the same one once more ends the rank at once. Another one does
not: at `scancel` SLURM sends SIGTERM, and `launch.sh` passes SIGUSR1 on. Imports neither torch nor transformers, since signals
may arrive before they are imported.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import ClassVar

EXIT_STATUS = 75
"""Exit status of a run that has ended early and can go on from its checkpoint (EX_TEMPFAIL: try again)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which schedulers announce that a job's time is over."""


class _Request:
    """The request of this process."""

    is_deferred: bool = False
    received: ClassVar[list[str]] = []


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Record signals instead of ending the process, while the body runs."""
    _Request.is_deferred = True
    _Request.received.clear()
    try:
        yield
    finally:
        _Request.is_deferred = False


def record(number: int) -> bool:
    """Record a signal, and return True; return False if it has to end this process: no run defers it, or it comes again."""
    name = signal.Signals(number).name
    if number not in SIGNALS or not _Request.is_deferred or name in _Request.received:
        return False
    _Request.received.append(name)
    return True


def recorded_signal() -> str:
    """Return the name of the first recorded signal, or ""."""
    return next(iter(_Request.received), "")
