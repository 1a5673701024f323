"""The outermost frame of a rank: from its launcher's variables to its exit status."""

from collections.abc import Callable

from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.launcher_watch import watch_launcher
from zero_sft.cluster.world import World


def run_rank(body: Callable[[World], None]) -> int:
    """Run a rank's part of a job, and return its exit status; whatever fails is said once in the job. Every rank.

    The rank ends with its launcher, and by SIGTERM, also while `body` waits for other ranks.
    """
    watch_launcher()
    failure.begin_job(World())
    try:
        world = World.detect()
        failure.begin_job(world)
        body(world)
    except KeyboardInterrupt:
        return failure.report_interrupt()
    except Exception as error:  # noqa: BLE001 - whatever it is, one rank says it
        return failure.report_failure(error)
    failure.end_job()
    return 0
