"""Run the preflight on every rank: `python -m zero_sft.preflight`, with the arguments of the job."""

import sys

from zero_sft.cluster.launcher_watch import leave
from zero_sft.preflight.run import main

status = main()
if status:
    leave(status)  # a normal exit of the interpreter may wait for ranks that are gone
sys.exit(status)
