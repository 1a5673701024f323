"""Measure the start-up of a job: the seconds of each part from process start to the end of the first step.

The clock starts at the process's start time as the kernel reports it, so that imports are included.
"""

import time
from collections.abc import Mapping

import psutil


class Timeline:
    """The consecutive parts of a start-up. Each part is named when it ends."""

    def __init__(self) -> None:
        self.began = self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """End `part`, which began when the previous part ended. Later calls for the same part have no effect."""
        if part not in self._seconds:
            now = time.time()
            self._seconds[part] = now - self._last
            self._last = now

    @property
    def seconds(self) -> Mapping[str, float]:
        """The seconds of each part that has ended."""
        return dict(self._seconds)

    def summary(self) -> str:
        """Return all parts as one line of text."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"the first step ended {sum(self._seconds.values()):.1f} s after the program's start: {parts}"
