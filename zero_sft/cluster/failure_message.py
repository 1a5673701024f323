"""Describe failures that are not one of `zero_sft.errors`: a rank that failed, and ranks that are gone."""

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path

from zero_sft.errors import DistributedError, RankLostError

_TOO_LITTLE_MEMORY = (
    "Process fewer tokens per device and step: use a smaller --per_device_train_batch_size (and more "
    "--gradient_accumulation_steps), a smaller --model_max_length, --activation_checkpointing True; or use more ranks, or "
    "--deepspeed zero3_offload. "
    "python -m zero_sft.estimate shows what a step needs."
)


def describe_failure(error: BaseException, rank: str, activity: str) -> DistributedError:
    """Describe an error that a rank raised, with advice if memory was too little."""
    message = f"{rank} failed while {activity}: {type(error).__name__}: {error}"
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # torch's class, which is not imported here
        return DistributedError(f"{message}\n{_TOO_LITTLE_MEMORY}", code="cluster.device_memory")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return DistributedError(f"{message}\nThe host has too little memory. {_TOO_LITTLE_MEMORY}", code="cluster.host_memory")
    return DistributedError(message, code="cluster.rank_failed")


def describe_lost_connection(error: BaseException | None, rank: str, activity: str) -> DistributedError:
    """Describe the loss of a rank that is not on this host."""
    reason = str(error).strip().splitlines()[0] if error and str(error).strip() else "the reason is unknown"
    return DistributedError(
        f"{rank} lost the connection to another rank while {activity}: {reason}\nA rank on another host has ended, or the "
        "network between the hosts has failed; the other hosts' messages say more.",
        code="cluster.connection_lost",
    )


def describe_dead_ranks(dead_ranks: Mapping[int, int], activity: str, kills: int) -> RankLostError:
    """Describe the end of ranks of this host.

    Args:
        dead_ranks: rank → process id.
        kills: the `kernel_kills` since the job began.
    """
    ranks = ", ".join(f"rank {rank} (process {pid})" for rank, pid in dead_ranks.items())
    host = socket.gethostname()
    if kills > 0:
        cause = (
            f"Meanwhile the kernel killed {kills} process{'es' * (kills > 1)} on {host} for lack of host memory. Use more "
            "hosts, fewer ranks on each, or less offloading to the host; python -m zero_sft.estimate shows the need."
        )
    else:
        cause = (
            "A signal has killed it: kill -9 by the user or the scheduler, a crash in native code, or lack of host memory "
            f"in its container (see dmesg on {host}, or the scheduler's record of the job)."
        )
    return RankLostError(f"{ranks} on {host} ended while {activity} and left no message. {cause}", code="cluster.rank_lost")


def kernel_kills() -> int:
    """Return the number of processes that the kernel has killed for lack of memory since the host booted."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
