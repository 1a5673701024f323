"""How much memory a load took at most: the growth of this process on the host and on its device."""

import re
from dataclasses import dataclass
from pathlib import Path

from zero_sft.storage.accelerator import accelerator

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySnapshot:
    """Bytes now, and the most so far since the process began, on the host and on the device; 0 where nobody counts."""

    host: int
    host_peak: int
    device: int
    device_peak: int

    @classmethod
    def now(cls) -> "MemorySnapshot":
        """This process's memory. On the host: resident, shared and mapped memory included."""
        counts = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", _STATUS.read_text())) if _STATUS.exists() else {}
        device = accelerator()
        on_host = device.device_name() == "cpu"
        return cls(
            host=int(counts.get("VmRSS", 0)) * 1024,
            host_peak=int(counts.get("VmHWM", 0)) * 1024,
            device=0 if on_host else int(device.memory_allocated()),
            device_peak=0 if on_host else int(device.max_memory_allocated()),
        )

    def growth_since(self, start: "MemorySnapshot") -> tuple[int, int]:
        """The most bytes over `start`, on the host and on the device.

        Where the process had once held more than it did now, before `start`, that peak is all that is known: the result is
        never too small.
        """
        return max(0, self.host_peak - start.host), max(0, self.device_peak - start.device)
