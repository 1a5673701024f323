"""Limit the time of code that a model's files bring, such as a chat template."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class TimeOver(Exception):
    """The time was over."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeOver` in the body after some seconds. In the main thread of a process; elsewhere there is no limit.

    Another timer of the process goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeOver

    began = time.monotonic()
    handler_before = signal.signal(signal.SIGALRM, end)
    seconds_before, interval_before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)
        if seconds_before:
            left = max(1e-3, seconds_before - (time.monotonic() - began))
            signal.setitimer(signal.ITIMER_REAL, left, interval_before)
