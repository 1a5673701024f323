"""A job that fails as FAULT says, on the ranks of FAULT_RANKS: `python -m tests.cluster.faulty`.

Without arguments, its ranks do nothing but exchange numbers; with those of `zero_sft.train`, they train.
"""

import os
import signal
import sys
import time
from pathlib import Path

from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.world import World


def _fault() -> None:
    if os.environ["RANK"] not in os.environ.get("FAULT_RANKS", "").split(","):
        return
    kind = os.environ["FAULT"]
    if kind == "raise":
        raise RuntimeError("the fault of this test")
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "data":
        from zero_sft.errors import DataError

        raise DataError("sample 7 can't be read", code="data.faulty")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _exchange_for_ever(world: World) -> None:
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.zero.process_group import connect

    world = connect(world)
    failure.set_log_folder(Path(os.environ["LOGS"]))
    failure.set_activity("training, in step 2")
    for number in range(100_000):
        all_gather_json(world, number)
        if number == 1:
            sys.stdout.write("'loss'\n")
        if number > 3:
            _fault()
        time.sleep(0.1)


def _train() -> int:
    from zero_sft import train
    from zero_sft.job.trainer import JobTrainer

    original = JobTrainer.training_step

    def training_step(self: JobTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step >= 1:
            _fault()
        return original(self, *args, **kwargs)

    JobTrainer.training_step = training_step
    return train.main()


def main() -> int:
    """The rank's exit status."""
    from zero_sft.cluster.rank_main import run_rank

    return _train() if any(word.startswith("--model") for word in sys.argv[1:]) else run_rank(_exchange_for_ever)


if __name__ == "__main__":
    from zero_sft.cluster.launcher_watch import leave

    leave(main())
