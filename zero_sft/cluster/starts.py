"""The number of a run's start: a launcher, or SLURM, starts a run again after a fault."""

import os

FOLDER_VARIABLE = "ZERO_SFT_RESTART_FOLDER"
"""Set by `launch.sh --max_restarts`: the folder in which the starts of this job leave how far they have come."""

START_VARIABLE = "ZERO_SFT_START"
"""Set by `launch.sh --max_restarts`: 1 for the first start."""


def is_later_start() -> bool:
    """Return whether this job has been started before, by `launch.sh --max_restarts` or by SLURM."""
    values = [(os.environ.get(START_VARIABLE, ""), 1), (os.environ.get("SLURM_RESTART_COUNT", ""), 0)]
    return any(value.isdecimal() and int(value) > first for value, first in values)


def job_name() -> str:
    """Return a name that all starts of this job share, and no other job; "" for a job that is started once."""
    slurm, folder = os.environ.get("SLURM_JOB_ID", ""), os.environ.get(FOLDER_VARIABLE, "")
    return f"SLURM job {slurm}" if slurm else folder


def start_number() -> int:
    """Return 1 in the first start of a run, 2 in the second, and so on."""
    for name, first in ((START_VARIABLE, 1), ("SLURM_RESTART_COUNT", 0)):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value) - first + 1
    return 1
