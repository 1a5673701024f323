"""Too little memory: how to tell that it ended a process, and what to do about it."""

import contextlib
from pathlib import Path

TOO_LITTLE_MEMORY = (
    "Give a device fewer tokens at a time: a smaller --per_device_train_batch_size (and more --gradient_accumulation_steps), a "
    "smaller --model_max_length, --activation_checkpointing True; or use more ranks, or --deepspeed zero3_offload. "
    "python -m zero_sft.estimate tells what a step needs."
)


def kernel_kills() -> int:
    """Processes that the kernel has killed for lack of memory, since the host started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def is_device_memory(error: BaseException) -> bool:
    """True for an error that says that a device has too little memory: torch's, without importing it."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def is_host_memory(error: BaseException) -> bool:
    """True for an error that says that the host has too little memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
