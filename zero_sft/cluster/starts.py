"""The number of a run's start: a launcher, or SLURM, starts a run again after a fault."""

import os

START_VARIABLE = "ZERO_SFT_START"
"""Set by `launch.sh --max_restarts`: 1 for the first start."""


def start_number() -> int:
    """Return 1 in the first start of a run, 2 in the second, and so on."""
    for name, first in ((START_VARIABLE, 1), ("SLURM_RESTART_COUNT", 0)):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value) - first + 1
    return 1
