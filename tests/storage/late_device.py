"""A device made of host memory, whose copies happen as late as they may: when somebody waits for them.

So a staging buffer that is overwritten too early, or a copy that nobody waits for, shows as wrong contents.
"""

from unittest import mock

import torch

from zero_sft.storage import reader


class LateQueue:
    """In place of `CopyQueue`."""

    def __init__(self, device):
        self.device, self.queued, self.done = device, [], 0

    def copy(self, place, elements, strides):
        self.queued.append((place, elements, strides))
        return LateEvent(self, len(self.queued))


class LateEvent:
    def __init__(self, queue, stop):
        self.queue, self.stop = queue, stop

    def synchronize(self):
        while self.queue.done < self.stop:
            place, elements, strides = self.queue.queued[self.queue.done]
            place.copy_(elements.as_strided(place.shape, strides))
            self.queue.done += 1


def late_device(pinned):
    """A patch of the reader under which every destination is on that device; `pinned` collects the staging buffers."""

    def make_pinned(numel, dtype):
        pinned.append(torch.zeros(numel, dtype=dtype))
        return pinned[-1]

    return mock.patch.multiple(
        reader,
        CopyQueue=LateQueue,
        is_on_device=lambda tensor: True,
        pinned_zeros=make_pinned,
    )
