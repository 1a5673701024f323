"""The peak memory of a load: how much this process has grown on the host and on its device."""

import re
from dataclasses import dataclass
from pathlib import Path

from zero_sft.storage.accelerator import accelerator

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySnapshot:
    """Current and peak bytes of this process, on the host and on the device. 0 where the system does not count them."""

    host: int
    host_peak: int
    device: int
    device_peak: int

    @classmethod
    def now(cls) -> "MemorySnapshot":
        """Measure this process. Host memory is resident memory, including shared and mapped pages."""
        counts = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", _STATUS.read_text())) if _STATUS.exists() else {}
        backend = accelerator()
        on_host = backend.device_name() == "cpu"
        return cls(
            host=int(counts.get("VmRSS", 0)) * 1024,
            host_peak=int(counts.get("VmHWM", 0)) * 1024,
            device=0 if on_host else int(backend.memory_allocated()),
            device_peak=0 if on_host else int(backend.max_memory_allocated()),
        )

    def growth_since(self, start: "MemorySnapshot") -> tuple[int, int]:
        """Return the peak bytes over `start`, on the host and on the device.

        The peak counts from the start of the process, so the result is too large if the peak was reached before `start`.
        """
        return max(0, self.host_peak - start.host), max(0, self.device_peak - start.device)
