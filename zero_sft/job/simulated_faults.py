"""Let ranks fail on purpose, as `--simulate_fault` asks. Importing this module imports transformers."""

import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from zero_sft.arguments.faults import Fault
from zero_sft.cluster.starts import start_number
from zero_sft.cluster.world import World

logger = logging.getLogger("zero_sft.train")


class SimulatedFaults(TrainerCallback):
    """The faults of this rank. Nothing here communicates.

    Args:
        faults: those of all ranks.
    """

    def __init__(self, faults: Sequence[Fault], world: World) -> None:
        now = [fault for fault in faults if fault.start in (0, start_number())]
        for fault in now:
            if world.is_main:
                logger.warning("--simulate_fault: %s", fault)
        self._faults = [fault for fault in now if fault.rank == world.rank]
        self._disk_is_full = False
        self.makes_nan = False
        """Whether the losses of the present step have to be NaN."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the faults of the step that begins."""
        step, self.makes_nan = state.global_step + 1, False
        for fault in self._faults:
            if fault.kind == "slow" and fault.step <= step:
                time.sleep(fault.seconds)
            elif fault.step == step:
                self._have(fault)

    def _have(self, fault: Fault) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "preempt":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "oom":
            raise torch.OutOfMemoryError("out of memory (--simulate_fault)")
        elif fault.kind == "hang":
            while True:
                time.sleep(1)
        elif fault.kind == "disk_full":
            self._disk_is_full = True
        elif fault.kind == "nan":
            self.makes_nan = True

    def failing(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that writes this rank's part of a checkpoint: it fails while the disk is full."""

        def write_or_fail(*args: Any, **kwargs: Any) -> Any:
            if self._disk_is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC) + " (--simulate_fault)")
            return write(*args, **kwargs)

        return write_or_fail
