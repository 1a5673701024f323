"""DeepSpeed's accelerator, as the device-specific parts of this folder use it. Imported late: a host-only load needs none."""

from collections.abc import Sequence
from typing import Any

import torch


def accelerator() -> Any:
    """DeepSpeed's accelerator object (CUDA, CPU, XPU, ...)."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in page-locked host memory, from which devices copy directly."""
    return accelerator().pin_memory(tensor)


def is_on_device(tensor: torch.Tensor) -> bool:
    """True if `tensor` is not in host memory."""
    return tensor.device.type != "cpu"


class CopyQueue:
    """Copies from page-locked buffers to one device, in their order, on a stream of their own.

    The stream is the given device's, whatever the calling thread's current device is: threads start with the first.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = accelerator()
        self._stream = self._accelerator.Stream(device=device)
        self._stream.wait_stream(self._accelerator.current_stream(device.index))  # destinations may be being zeroed there

    def copy(self, place: torch.Tensor, elements: torch.Tensor, strides: Sequence[int]) -> None:
        """Queue a copy of flat `elements` to `place`, cast and put apart (`strides` of elements) on the device.

        They must stay as they are until the event of the next `mark` has come.
        """
        with self._accelerator.stream(self._stream):
            arrived = elements.to(place.device, non_blocking=True)
            place.copy_(arrived.as_strided(place.shape, strides))

    def mark(self) -> Any:
        """An event that comes after everything queued so far."""
        event = self._accelerator.Event()
        event.record(self._stream)
        return event


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, writable in place."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)
