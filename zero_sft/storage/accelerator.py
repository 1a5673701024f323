"""DeepSpeed's accelerator, as the device-specific parts of this folder use it. Imported late: a host-only load needs none."""

from collections.abc import Sequence
from typing import Any

import torch


def accelerator() -> Any:
    """DeepSpeed's accelerator object (CUDA, CPU, XPU, ...)."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def pinned_zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """`numel` zeros in page-locked host memory, from which devices copy directly.

    They are made there: pinning an ordinary tensor would hold both for a while, twice a rank's offloaded shards.
    """
    device = accelerator()
    if device.device_name() == "cpu":  # nothing is page-locked there, and fresh zeros cost nothing until they are touched
        return device.pin_memory(torch.zeros(numel, dtype=dtype))
    return device.pin_empty(numel, dtype=dtype).zero_()


def is_on_device(tensor: torch.Tensor) -> bool:
    """True if `tensor` is not in host memory."""
    return tensor.device.type != "cpu"


class CopyQueue:
    """Copies from page-locked buffers to one device, in their order, on their own stream.

    It belongs to the thread that makes it, whose current device it sets: threads start with the first device, and whatever
    they ask of CUDA there (memory, events) would take some hundred MiB of it for each rank of the node.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = accelerator()
        self._accelerator.set_device(device.index or 0)
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
