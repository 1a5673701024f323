"""DeepSpeed's accelerator, for the device-specific parts of this folder. It is imported only when a function needs it."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch


def accelerator() -> Any:
    """Return DeepSpeed's accelerator object (CUDA, CPU, XPU, ...)."""
    module: Any = importlib.import_module("deepspeed.accelerator")
    return module.get_accelerator()


def pinned_zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate `numel` zeros in page-locked host memory, from which devices copy directly.

    The tensor is allocated there, because pinning an ordinary tensor needs memory for both during the copy.
    """
    backend = accelerator()
    if backend.device_name() == "cpu":  # the CPU accelerator locks no pages, and fresh zeros cost nothing until first touch
        return backend.pin_memory(torch.zeros(numel, dtype=dtype))
    return backend.pin_empty(numel, dtype=dtype).zero_()


def is_on_device(tensor: torch.Tensor) -> bool:
    """True if `tensor` is not in host memory."""
    return tensor.device.type != "cpu"


class CopyQueue:
    """A queue of copies from page-locked buffers to one device, in order, on a separate stream.

    Only the thread that creates it may use it, since it sets that thread's current device. Threads start with the first device,
    where any CUDA call (memory, events) would take some hundred MiB for each rank of the node.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = accelerator()
        self._accelerator.set_device(device.index or 0)
        self._stream = self._accelerator.Stream(device=device)
        self._stream.wait_stream(self._accelerator.current_stream(device.index))  # it may still be zeroing the destinations

    def copy(self, place: torch.Tensor, elements: torch.Tensor, strides: Sequence[int]) -> Any:
        """Queue a copy of the flat `elements`, seen with `strides`, to `place`. Casting and scattering happen on the device.

        Returns:
            An event. `elements` must not change until it has completed.
        """
        with self._accelerator.stream(self._stream):
            on_device = elements.to(place.device, non_blocking=True)
            place.copy_(on_device.as_strided(place.shape, strides))
        event = self._accelerator.Event()
        event.record(self._stream)
        return event
