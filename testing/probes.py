"""Measure a process's memory, the bytes it reads, and the bytes through the loopback interface. From /proc on Linux."""

import fcntl
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch


def _status() -> dict[str, int]:
    """Read the Rss lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, *_ in fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """The bytes that this process has requested with read calls, and the number of the calls."""

    nbytes: int
    calls: int


def reads() -> Reads:
    """Count this process's reads so far, without pages of mapped files; `file_memory` counts those."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return Reads(nbytes=int(fields["rchar"]), calls=int(fields["syscr"]))


def file_memory() -> int:
    """Return the bytes in pages of mapped files that this process has touched (RssFile)."""
    return _status()["RssFile"]


def private_memory() -> int:
    """Return the bytes that this process holds apart from mapped files (RssAnon + RssShmem)."""
    status = _status()
    return status["RssAnon"] + status["RssShmem"]


def loopback_bytes() -> int:
    """Return the bytes received on `lo` in this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def loopback_up() -> None:
    """Bring `lo` up, since it is down in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS


class PeakMemory:
    """Sample memory every few milliseconds inside the context; `growth` is the peak minus the value at the start."""

    def __enter__(self) -> "PeakMemory":
        self._start = self._peak = (private_memory(), file_memory())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._take()

    def _take(self) -> None:
        self._peak = (max(self._peak[0], private_memory()), max(self._peak[1], file_memory()))

    @property
    def growth(self) -> int:
        """The growth of private and shared memory, in bytes."""
        return self._peak[0] - self._start[0]

    @property
    def file_growth(self) -> int:
        """The growth of mapped files, in bytes."""
        return self._peak[1] - self._start[1]


def machine() -> str:
    """Describe the machine in one line."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpu_lines if "model name" in line), "?")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    import os

    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
