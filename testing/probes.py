"""What a process has used: memory, bytes read, bytes through the loopback interface. Linux, from /proc."""

import fcntl
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch


def _status() -> dict[str, int]:
    """The Rss lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, *_ in fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Bytes that this process has asked read calls for, and the number of these calls."""

    nbytes: int
    calls: int


def reads() -> Reads:
    """By read calls alone; what a mapping of a file brings in shows as `RssFile`."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return Reads(nbytes=int(fields["rchar"]), calls=int(fields["syscr"]))


def file_memory() -> int:
    """RssFile: mapped files' pages that this process has touched, in bytes."""
    return _status()["RssFile"]


def private_memory() -> int:
    """RssAnon + RssShmem: what this process holds besides mapped files, in bytes."""
    status = _status()
    return status["RssAnon"] + status["RssShmem"]


def loopback_bytes() -> int:
    """Bytes received on `lo` in this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def loopback_up() -> None:
    """Switch `lo` on, in a fresh network namespace where it is off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS


class PeakMemory:
    """Samples memory every few milliseconds while it is open; growths are peaks over the start, in bytes."""

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
        """Of private and shared memory."""
        return self._peak[0] - self._start[0]

    @property
    def file_growth(self) -> int:
        """Of mapped files."""
        return self._peak[1] - self._start[1]


def machine() -> str:
    """The machine in a few words."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    import os

    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
