"""Recognise errors caused by too little memory, and advise on remedies."""

import contextlib
from pathlib import Path

TOO_LITTLE_MEMORY = (
    "Process fewer tokens per device and step: use a smaller --per_device_train_batch_size (and more "
    "--gradient_accumulation_steps), a smaller --model_max_length, --activation_checkpointing True; or use more ranks, or "
    "--deepspeed zero3_offload. "
    "python -m zero_sft.estimate shows what a step needs."
)


def kernel_kills() -> int:
    """Return the number of processes that the kernel has killed for lack of memory since the host booted."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def is_device_memory(error: BaseException) -> bool:
    """Return True if a device ran out of memory. Matches torch's class by name, so that torch is not imported."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def is_host_memory(error: BaseException) -> bool:
    """Return True if the host ran out of memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
