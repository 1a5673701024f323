"""Report the failure of a job once, from one rank.

Rank 0 prints an error that all ranks share. A rank prints an error that it alone has, with its traceback if the error is not
one of `zero_sft.errors`. The other ranks then see only consequences: closed connections, failed collectives, SIGTERM from the
launcher. They print nothing and write their traceback to a file in the output folder. If a rank died without a message, one of
the remaining ranks reports it.

Does not import torch, so that a rank can watch its launcher while the libraries are imported.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zero_sft import errors
from zero_sft.cluster.memory_advice import TOO_LITTLE_MEMORY, is_device_memory, is_host_memory, kernel_kills
from zero_sft.cluster.node_board import NodeBoard
from zero_sft.cluster.world import World

FOLLOW_ON_SECONDS = 3.0
"""Time that a rank gives a lost peer to print its message first."""

_STAGE = "_zero_sft_stage"
"""Attribute of an error that holds the stage in which it was raised."""

_LOST_PEER = re.compile(
    r"gloo|NCCL|HCCL|RCCL|Connection (closed|reset|refused)|Broken pipe|monitoredBarrier|Timed out waiting|recvValue",
    re.IGNORECASE,
)


@dataclass
class _Job:
    """State that the failure message needs, one per process. `run_rank`, `init_control_group` and the job set it."""

    world: World = field(default_factory=World)
    stage: str | Callable[[], str] = "starting"
    board: NodeBoard | None = None
    logs: Path | None = None
    kills_before: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_leaving: bool = False


_job = _Job()


def begin_job(world: World) -> None:
    """Start with fresh state, dropping that of an earlier job in this process. Any rank; does not communicate."""
    global _job
    _job = _Job(world=world, kills_before=kernel_kills())


def set_stage(stage: str | Callable[[], str]) -> None:
    """Set what the job is doing, such as "reading the weights", for the failure message."""
    _job.stage = stage


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Set the stage while the body runs, and attach it to an error that the body raises."""
    job, before, _job.stage = _job, _job.stage, name
    try:
        yield
    except Exception as error:
        if not hasattr(error, _STAGE):
            setattr(error, _STAGE, name)
        raise
    finally:
        job.stage = before


def set_board(world: World, board: NodeBoard | None) -> None:
    """Set the node's board, and the world that the ranks have agreed on."""
    _job.world, _job.board = world, board


def set_log_folder(folder: Path) -> None:
    """Set the folder for the tracebacks of ranks that print nothing."""
    _job.logs = folder


def report_failure(error: BaseException) -> int:
    """Report an error once in the whole job, and return the exit status. For the outermost handler, on every rank."""
    if not _begin_to_leave():
        return 1
    is_ours = isinstance(error, errors.ZeroSftError)
    if isinstance(error, errors.RankLostError) or (not is_ours and _follows_from_another(error)):
        _write_traceback(error)
        _report_lost_rank(error)
    elif isinstance(error, errors.ZeroSftError) and not error.rank_local:
        _report_shared_error(error)
    elif not _claim():
        _write_traceback(error)
    elif isinstance(error, errors.ZeroSftError):
        _print_rank_local(error)
    else:
        path = _write_traceback(error)
        _report(_describe_failure(error))
        _print_traceback(error, path)
    return 1


def report_interrupt() -> int:
    """Report that the user stopped the job, and return the exit status. For the outermost handler, on every rank."""
    if _begin_to_leave() and _job.world.is_main and _claim():
        _report(errors.DistributedError(f"stopped by Ctrl-C (SIGINT) while {_stage()}.", code="cluster.interrupted"))
    return 128 + signal.SIGINT


def report_signal(name: str) -> bool:
    """Report that a signal ends this rank, unless another rank has reported; return False if this rank is already ending.

    Called by the thread that watches for signals.
    """
    if not _begin_to_leave():
        return False
    if _job.board is None:
        if _job.world.is_main:
            _report(errors.DistributedError(f"{name} has ended the job while {_stage()}.", code="cluster.ended_by_signal"))
    elif _job.board.dead_ranks():
        if _claim():
            _report(_describe_loss(None))
    elif _claim():
        _report(
            errors.DistributedError(
                f"{name} has ended the job while {_stage()}. The user, the launcher or the scheduler sent it.",
                code="cluster.ended_by_signal",
            )
        )
    return True


def report_orphan(launcher: str) -> bool:
    """Report that the launcher has ended and this job with it; return False if this rank is already ending.

    Called by the thread that watches the launcher.
    """
    if not _begin_to_leave():
        return False
    is_reporter = _claim() if _job.board else _job.world.local_rank == 0
    if is_reporter:
        _report(
            errors.DistributedError(
                f"the launcher ({launcher}) has ended while {_stage()}, so its ranks end as well.",
                code="cluster.launcher_ended",
            )
        )
    return True


def end_job() -> None:
    """Mark the job as successful: the end of the launcher or of this rank is no longer a failure."""
    _job.is_leaving = True


def _begin_to_leave() -> bool:
    """Return True for the first thread of this rank that reports a failure."""
    with _job.lock:
        is_first = not _job.is_leaving
        _job.is_leaving = True
        return is_first


def _follows_from_another(error: BaseException) -> bool:
    """Return True for an error that torch.distributed raises when another rank is gone."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch's class, by name: torch is not imported here
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None and _job.world.world_size > 1


def _report_shared_error(error: errors.ZeroSftError) -> None:
    """Report an error that every rank should have, on rank 0. If rank 0 does not have it, a rank that has it reports it."""
    if _job.world.is_main:
        if _claim():
            _report(error)
    elif _job.board and not error.collective:
        deadline = time.monotonic() + FOLLOW_ON_SECONDS
        while not _job.board.is_claimed and time.monotonic() < deadline:
            time.sleep(0.05)
        if _job.board.claim() and _is_first_host(otherwise=False):
            _print_rank_local(error)


def _report_lost_rank(error: BaseException) -> None:
    """Wait briefly for the message of the lost rank; then one rank of the node reports the loss."""
    deadline = time.monotonic() + FOLLOW_ON_SECONDS
    while time.monotonic() < deadline:
        if _job.board and _job.board.is_claimed:
            return
        if _job.board and _job.board.dead_ranks() and time.monotonic() > deadline - FOLLOW_ON_SECONDS + 0.5:
            break  # the dead rank had half a second to report
        time.sleep(0.05)
    if not (_job.board or _job.world.is_main) or not _claim():
        return
    _report(_describe_loss(error))
    if not isinstance(error, errors.RankLostError) and not (_job.board and _job.board.dead_ranks()):
        _print_traceback(error, None)  # no rank has died, so this error may be the cause


def _describe_failure(error: BaseException) -> errors.DistributedError:
    """Describe an error of this rank that is not one of `zero_sft.errors`."""
    message = f"{_here()} failed while {_stage(error)}: {type(error).__name__}: {error}"
    if is_device_memory(error):
        return errors.DistributedError(f"{message}\n{TOO_LITTLE_MEMORY}", code="cluster.device_memory")
    if is_host_memory(error):
        return errors.DistributedError(
            f"{message}\nThe host has too little memory. {TOO_LITTLE_MEMORY}", code="cluster.host_memory"
        )
    return errors.DistributedError(message, code="cluster.rank_failed")


def _describe_loss(error: BaseException | None) -> errors.ZeroSftError:
    dead = _job.board.dead_ranks() if _job.board else {}
    host = socket.gethostname()
    if not dead and isinstance(error, errors.RankLostError):
        return error
    if not dead:
        reason = str(error).strip().splitlines()[0] if error and str(error).strip() else "the reason is unknown"
        return errors.DistributedError(
            f"{_here()} lost the connection to another rank while {_stage(error)}: {reason}\nA rank on another host has "
            "ended, or the network between the hosts has failed; the other hosts' messages say more.",
            code="cluster.connection_lost",
        )
    ranks = ", ".join(f"rank {rank} (process {pid})" for rank, pid in dead.items())
    kills = kernel_kills() - _job.kills_before
    if kills > 0:
        cause = f"Meanwhile the kernel killed {kills} process{'es' * (kills > 1)} on {host} for lack of host memory. "
        cause += (
            "Use more hosts, fewer ranks on each, or less offloading to the host; python -m zero_sft.estimate shows the need."
        )
    else:
        cause = (
            "A signal has killed it: kill -9 by the user or the scheduler, a crash in native code, or lack of host memory "
            f"in its container (see dmesg on {host}, or the scheduler's record of the job)."
        )
    return errors.RankLostError(
        f"{ranks} on {host} ended while {_stage(error)} and left no message. {cause}", code="cluster.rank_lost"
    )


def _claim() -> bool:
    """Return True for the first rank that calls; for the first of each host if rank 0 and its store are gone."""
    return (_job.board is None or _job.board.claim()) and _is_first_host(otherwise=True)


def _is_first_host(*, otherwise: bool) -> bool:
    """Return True if no other host has claimed to report, or `otherwise` if rank 0, which holds the store, is gone."""
    if len(set(_job.world.node_leaders)) < 2:
        return True
    answers: list[int] = []

    def ask() -> None:
        import torch

        with contextlib.suppress(Exception):
            store = torch.distributed.distributed_c10d._get_default_store()
            answers.append(store.add("zero_sft/spoken", 1))

    thread = threading.Thread(target=ask, daemon=True)  # the call can hang if rank 0 is gone
    thread.start()
    thread.join(FOLLOW_ON_SECONDS)
    return answers[0] == 1 if answers else otherwise


def _here() -> str:
    return f"rank {_job.world.rank} on {socket.gethostname()}"


def _stage(error: BaseException | None = None) -> str:
    """Return the stage in which `error` was raised, or the present one."""
    if hasattr(error, _STAGE):
        return getattr(error, _STAGE)
    try:
        return _job.stage() if callable(_job.stage) else _job.stage
    except Exception:  # noqa: BLE001 - the report must not fail
        return "training"


def _report(error: errors.ZeroSftError) -> None:
    _print_error(error.with_code)


def _print_rank_local(error: errors.ZeroSftError) -> None:
    _print_error(f"{errors.without_tokens(str(error))} (rank {_job.world.rank} alone) [{error.code}]")


def _print_error(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"\nerror: {message}\n")
    sys.stderr.flush()


def _print_traceback(error: BaseException, path: Path | None) -> None:
    text = errors.without_tokens("".join(traceback.format_exception(error)))
    sys.stderr.write(f"The traceback{f', also in {path}' if path else ''}:\n{text}")
    sys.stderr.flush()


def _write_traceback(error: BaseException) -> Path | None:
    """Write the traceback to the log folder if possible; a failure to write must not hide the error."""
    if _job.logs is None:
        return None
    path = _job.logs / f"error_rank_{_job.world.rank}.txt"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"{_here()}, process {os.getpid()}, while {_stage(error)}\n"
            + errors.without_tokens("".join(traceback.format_exception(error)))
        )
        return path
    return None
