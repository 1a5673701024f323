"""Positioned writes of a tensor's bytes: the reader run backwards."""

import os
from pathlib import Path

import torch

from zero_sft.storage.accelerator import bytes_view

STAGING_BYTES = 16 * 2**20


def write_at(handle: int, path: Path, flat: torch.Tensor, offset_bytes: int) -> None:
    """Write the flat tensor `flat` at `offset_bytes` of the open file. From a device it passes the host in bounded parts.

    Raises:
        OSError: with the file's name.
    """
    step = STAGING_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        part = flat.detach().narrow(0, start, min(step, flat.numel() - start)).to("cpu").contiguous()
        view = bytes_view(part)
        position = 0
        while position < len(view):
            try:
                position += os.pwrite(handle, view[position:], offset_bytes + start * flat.element_size() + position)
            except OSError as error:
                error.filename = str(path)
                raise
