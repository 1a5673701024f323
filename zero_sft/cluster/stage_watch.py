"""End a run if a rank is stuck in something other than a training step: in a load, a download, a save or an export.

How long these take depends on sizes and on storage, so no time limit suits all. A rank is taken to be stuck when its processes
neither read nor write nor compute.

Imports neither torch nor transformers.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from zero_sft import errors
from zero_sft.cluster import failure_report
from zero_sft.cluster.watchdog import Watchdog, place_of_main_thread

IDLE_SECONDS = 1800.0
"""The time after which a rank that has done nothing is taken to be stuck."""

_BYTES_PER_SECOND = 16 * 2**10
"""A rank that moves fewer bytes is idle, unless it computes: progress bars and log lines alone take a few KiB/s."""

_CPU_SHARE = 0.05
"""A rank that uses less of one core is idle, unless it moves bytes: progress bars and watching threads alone take 1 to 2 %."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters of this process and its children, for what they have read, written and computed so far."""

    nbytes: int
    cpu_seconds: float
    time: float

    def is_idle_since(self, earlier: "Usage") -> bool:
        """Return whether nearly nothing has been done between the two. Pure."""
        seconds = self.time - earlier.time
        moved, computed = self.nbytes - earlier.nbytes, self.cpu_seconds - earlier.cpu_seconds
        return moved < _BYTES_PER_SECOND * seconds and computed < _CPU_SHARE * seconds


def usage() -> Usage:
    """Return the present usage. The bytes are those of all reads and writes of files, cached or not."""
    process = psutil.Process()
    nbytes, cpu_seconds = 0, 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, AttributeError):  # it has ended, or the system has no such counters
            io, cpu = each.io_counters(), each.cpu_times()
            nbytes += io.read_chars + io.write_chars
            cpu_seconds += cpu.user + cpu.system
    return Usage(nbytes=nbytes, cpu_seconds=cpu_seconds, time=time.monotonic())


class StageWatch:
    """Watches this rank while it is in a stage. Its methods do not communicate.

    Args:
        on_stuck: called in the watching thread with the stage and the seconds for which the rank has done nothing.
        seconds: the time after which an idle rank is stuck; it has been seen idle for half of it. 0: it is never.
    """

    def __init__(self, on_stuck: Callable[[str, float], None], seconds: float, poll_seconds: float = 1.0) -> None:
        self._seconds = seconds
        self._watchdog = Watchdog(lambda stage, _: on_stuck(stage, seconds), poll_seconds) if seconds else None
        self._stages: list[str] = []

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Watch while the body runs. An inner stage stands for the outer one until it ends."""
        self._stages.append(stage)
        self._expect()
        try:
            yield
        finally:
            self._stages.pop()
            self._expect()

    def _expect(self) -> None:
        if self._watchdog is None:
            return
        if not self._stages:
            self._watchdog.done()
            return
        last: Usage | None = None  # most stages are over before anyone looks, which takes some ms

        def goes_on() -> bool:
            nonlocal last
            before, last = last, usage()
            return before is None or not last.is_idle_since(before)

        self._watchdog.expect(self._stages[-1], self._seconds / 2, goes_on)

    def close(self) -> None:
        """End the thread."""
        if self._watchdog is not None:
            self._watchdog.close()


_watch: StageWatch | None = None  # set while a job runs: without one, a caller of the library decides how long it waits


@contextlib.contextmanager
def watching(end: Callable[[int], None], seconds: float | None) -> Iterator[None]:
    """Watch this rank's stages while the body runs.

    Args:
        end: ends the process with a status.
        seconds: those of `StageWatch`; None: `IDLE_SECONDS`.
    """
    global _watch

    def on_stuck(stage: str, limit: float) -> None:
        place = place_of_main_thread()
        idle = f"has neither read nor written nor computed for {limit:,.0f} s"
        error = errors.DistributedError(
            f"{failure_report.here()} {idle} while {stage}: it is stuck in {place}. See the host's storage and network "
            "(`dmesg`). --stage_timeout SECONDS sets another limit.",
            code="cluster.stage_stuck",
        )
        failure_report.report_stuck(lambda: error, f"while {stage}, where it {idle}")
        end(1)

    _watch = StageWatch(on_stuck, IDLE_SECONDS if seconds is None else seconds)
    try:
        yield
    finally:
        _watch.close()
        _watch = None


@contextlib.contextmanager
def during(stage: str) -> Iterator[None]:
    """Run a stage in which this rank must not be idle; unwatched outside `watching`."""
    with contextlib.nullcontext() if _watch is None else _watch.during(stage):
        yield
