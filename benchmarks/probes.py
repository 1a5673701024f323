"""What a process has used: memory, bytes read, bytes through the loopback interface. Linux, from /proc."""

import fcntl
import socket
import struct
import threading
import time
from pathlib import Path

import torch


def _status() -> dict[str, int]:
    """The Rss lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, *_ in fields}


def bytes_read() -> int:
    """Bytes this process has read so far: by read calls (`rchar`), and by touching mapped files (`RssFile`)."""
    rchar = int(Path("/proc/self/io").read_text().split()[1])
    return rchar + _status()["RssFile"]


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
    """Samples `private_memory` every few milliseconds while it is open; `growth` is the peak over the start."""

    def __enter__(self) -> "PeakMemory":
        self._start = self._peak = private_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, private_memory())

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, private_memory())

    @property
    def growth(self) -> int:
        """Bytes over the start."""
        return self._peak - self._start


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
