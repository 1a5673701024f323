"""Protect a public function from a default device that its caller has set, which would move its small tensors there.

`with torch.device("meta")` and `torch.set_default_device` are usual around the construction of other models. Exchanges between
ranks and reading buffers need memory on the CPU; weights are put on their device by name.
"""

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def cpu_by_default() -> Generator[None]:
    """Create tensors on the CPU where the code names no device, as torch does by default. A context or a decorator."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
