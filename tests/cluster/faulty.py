"""The job with a fault in it: `python -m tests.cluster.faulty`, with FAULT, a rank and a step in the environment."""

import os
import signal
import sys
import time

from zero_sft import train


def _fault(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("the fault of this test")
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "data":
        from zero_sft.errors import DataError

        raise DataError("sample 7 can't be read")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "sleep":
        time.sleep(1000)


def main() -> int:
    """`zero_sft.train.main` with a step that fails on the ranks that FAULT_RANKS lists."""
    from zero_sft.trainer import Trainer

    original = Trainer.training_step

    def training_step(self: Trainer, *args: object, **kwargs: object) -> object:
        ranks = os.environ["FAULT_RANKS"].split(",")
        if self.state.global_step >= 1 and os.environ["RANK"] in ranks:
            _fault(os.environ["FAULT"])
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
