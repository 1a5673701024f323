"""The devices that tests find, and cases that are tried one after the other in a process."""

import contextlib
import os
import traceback
from collections.abc import Iterator

import torch

from tests import models


def device_count() -> int:
    """Accelerators of this machine; 0 where DeepSpeed trains on the CPU.

    `ZERO_SFT_TEST_DEVICES=cpu` rehearses these tests on CPU ranks, so that a slip in them is found without a GPU.
    """
    if os.environ.get("ZERO_SFT_TEST_DEVICES") == "cpu":
        return 2
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else accelerator.device_count()


def device() -> torch.device:
    """This rank's device."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def on_cpu() -> bool:
    """True in a rehearsal: nothing is page-locked there, and shards are host memory."""
    return device().type == "cpu"


def plain(folder, dtype: torch.dtype):
    """The reference, also after a sharded load, which leaves transformers in its ZeRO-3 way of loading."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    return models.plain(folder, dtype)


class Cases:
    """`with cases.case(name):` a body whose failure is kept; `require_all` raises them all at the end.

    On several ranks a case must not fail on one alone: the others would wait for it in a collective.
    """

    def __init__(self) -> None:
        self._failures: list[str] = []

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case."""
        try:
            yield
        except Exception:
            self._failures.append(f"{name}:\n{traceback.format_exc()}")

    def require_all(self) -> None:
        """Raise AssertionError naming each case that failed, with its traceback."""
        assert not self._failures, f"{len(self._failures)} failed\n" + "\n".join(self._failures)
