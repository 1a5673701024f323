"""DeepSpeed's accelerator, as the device-specific parts of this folder use it. Imported late: a host-only load needs none."""

from typing import Any

import torch


def accelerator() -> Any:
    """DeepSpeed's accelerator object (CUDA, CPU, XPU, ...)."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in page-locked host memory, from which devices copy directly."""
    return accelerator().pin_memory(tensor)


def recorded_event() -> Any:
    """An event on the current stream, after everything queued there so far."""
    event = accelerator().Event()
    event.record()
    return event


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, writable in place."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)
