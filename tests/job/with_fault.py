"""The job, with a fault of one rank in one of its stages: FAULT=KIND:RANK:STAGE `python -m tests.job.with_fault`.

The kinds: `kill` (SIGKILL), `hang`, `term` (SIGTERM), `full` (a full disk).
"""

import errno
import os
import signal
import sys
import time

from zero_sft import train

STAGES = {
    "load": ("zero_sft.storage.reader", "fill"),
    "answers": ("zero_sft.job.generation", "answer"),
    "evaluation": ("zero_sft.job.trainer", "JobTrainer.prediction_step"),
    "save": ("zero_sft.saving.checkpoint_saver", "write_parts"),
    "export": ("zero_sft.saving.weight_files", "write_parts"),  # with --save_strategy no: a checkpoint calls it, too
}
"""For each stage, the module and the function whose call has the fault."""


def faulty(stage: str, kind: str) -> None:
    """Let the stage's function have the fault, once, before it does its work."""
    import importlib

    module, name = STAGES[stage]
    owner = importlib.import_module(module)
    *classes, name = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function = getattr(owner, name)
    to_come = [kind]  # a caller may have kept the function with the fault

    def with_fault(*args, **kwargs):
        if to_come:
            have(to_come.pop())
        return function(*args, **kwargs)

    setattr(owner, name, with_fault)


def have(kind: str) -> None:
    if kind == "hang":
        time.sleep(1000)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[kind])
        time.sleep(1)  # until the watching thread has received it


if __name__ == "__main__":
    from zero_sft.cluster.launcher_watch import leave

    kind, rank, stage = os.environ["FAULT"].split(":")
    if os.environ["RANK"] == rank:
        faulty(stage, kind)
    leave(train.main(sys.argv[1:]))
