"""Outermost function of a rank's process: from the launcher's variables to the exit status."""

import os
from collections.abc import Callable

from zero_sft.cluster import failure_report
from zero_sft.cluster.launcher_watch import early_claim, watch_launcher
from zero_sft.cluster.world import World
from zero_sft.errors import is_failure


def run_rank(body: Callable[[World], None]) -> int:
    """Run `body` on this rank and return the exit status; a failure is reported once in the whole job. Every rank.

    The rank ends when its launcher ends or on SIGTERM, even while `body` waits for other ranks.
    """
    # Ranks that wait for rank 0 would print torch's stacks each time they try again.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    watch_launcher()
    claim = early_claim()
    failure_report.begin_job(World.alone(), claim)
    try:
        world = World.detect()
        failure_report.begin_job(world, claim)
        body(world)
    except KeyboardInterrupt:
        return failure_report.report_interrupt()
    except BaseException as error:
        if not is_failure(error):
            raise
        return failure_report.report_failure(error)
    failure_report.mark_succeeded()
    return 0
