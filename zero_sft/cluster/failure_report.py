"""One message for a job that fails, from one rank, whatever the other ranks then see.

An error that all ranks agree on is said by rank 0. An error that one rank has is said by that rank, with its traceback if it is
not one of `zero_sft.errors`. What other ranks then meet (connections that are closed, collectives that fail, SIGTERM from
the launcher) follows from it: they are silent, and write their traceback to a file of the output folder. If a rank has died
and said nothing, one of those that are left says so.

Imports no torch, so that a rank can watch its launcher while the libraries are imported.
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
"""How long a rank whose peer is gone waits for the peer's own message."""

_STAGE = "_zero_sft_stage"
"""The attribute of an error with the stage in which it came."""

_LOST_PEER = re.compile(
    r"gloo|NCCL|HCCL|RCCL|Connection (closed|reset|refused)|Broken pipe|monitoredBarrier|Timed out waiting|recvValue",
    re.IGNORECASE,
)


@dataclass
class _Job:
    """What is known when the job fails. `run_rank`, `connect` and the job set it; it lives as long as the process."""

    world: World = field(default_factory=World)
    stage: str | Callable[[], str] = "starting"
    board: NodeBoard | None = None
    logs: Path | None = None
    kills_before: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_leaving: bool = False


_job = _Job()


def begin_job(world: World) -> None:
    """Forget a former job of this process. Any rank by itself."""
    global _job
    _job = _Job(world=world, kills_before=kernel_kills())


def set_stage(stage: str | Callable[[], str]) -> None:
    """Name what the job does now, for the message if it fails: "reading the weights"."""
    _job.stage = stage


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """`set_stage` for the body; an error of the body remembers it."""
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
    """Remember the node's board and the world as the ranks have agreed on it."""
    _job.world, _job.board = world, board


def set_log_folder(folder: Path) -> None:
    """Name the folder for the tracebacks of ranks that say nothing."""
    _job.logs = folder


def report_failure(error: BaseException) -> int:
    """Say an error once in the job, and return the exit status. For the outermost handler, on every rank."""
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
        _say_alone(error)
    else:
        path = _write_traceback(error)
        _say(_failed(error))
        _say_traceback(error, path)
    return 1


def report_interrupt() -> int:
    """Say that a person has stopped the job, and return the exit status. For the outermost handler, on every rank."""
    if _begin_to_leave() and _job.world.is_main and _claim():
        _say(errors.DistributedError(f"stopped by Ctrl-C (SIGINT) while {_stage()}.", code="cluster.interrupted"))
    return 128 + signal.SIGINT


def report_signal(name: str) -> bool:
    """Say that a signal ends this rank, unless a rank has spoken; False if it is about to end by itself.

    Called by the thread that watches for signals.
    """
    if not _begin_to_leave():
        return False
    if _job.board is None:
        if _job.world.is_main:
            _say(errors.DistributedError(f"{name} has ended the job while {_stage()}.", code="cluster.ended_by_signal"))
    elif _job.board.dead_ranks():
        if _claim():
            _say(_lost(None))
    elif _claim():
        _say(
            errors.DistributedError(
                f"{name} has ended the job while {_stage()}. A person, the launcher or the scheduler sent it.",
                code="cluster.ended_by_signal",
            )
        )
    return True


def report_orphan(launcher: str) -> bool:
    """Say that the launcher has ended, and with it this job; False if this rank is about to end by itself.

    Called by the thread that watches the launcher.
    """
    if not _begin_to_leave():
        return False
    speaks = _claim() if _job.board else _job.world.local_rank == 0
    if speaks:
        _say(
            errors.DistributedError(
                f"the launcher has ended ({launcher}), so its ranks end too; it was while {_stage()}.",
                code="cluster.launcher_ended",
            )
        )
    return True


def end_job() -> None:
    """The job has ended well: whatever ends the launcher or this rank from now on is not a failure."""
    _job.is_leaving = True


def _begin_to_leave() -> bool:
    """True for the first thread of this rank that reports a failure."""
    with _job.lock:
        first = not _job.is_leaving
        _job.is_leaving = True
        return first


def _follows_from_another(error: BaseException) -> bool:
    """True for the errors of torch.distributed that a rank gets when another one is gone."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch's; without importing it here
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None and _job.world.world_size > 1


def _report_shared_error(error: errors.ZeroSftError) -> None:
    """Rank 0 says an error that every rank has. If it has not got it, nor agreed to it, the rank that has it says it."""
    if _job.world.is_main:
        if _claim():
            _say(error)
    elif _job.board and not error.collective:
        deadline = time.monotonic() + FOLLOW_ON_SECONDS
        while not _job.board.is_claimed and time.monotonic() < deadline:
            time.sleep(0.05)
        if _job.board.claim() and _is_first_host(otherwise=False):
            _say_alone(error)


def _report_lost_rank(error: BaseException) -> None:
    """Wait a little for the message of the rank that is gone; then one rank of the node speaks for it."""
    deadline = time.monotonic() + FOLLOW_ON_SECONDS
    while time.monotonic() < deadline:
        if _job.board and _job.board.is_claimed:
            return
        if _job.board and _job.board.dead_ranks() and time.monotonic() > deadline - FOLLOW_ON_SECONDS + 0.5:
            break  # whoever is gone had half a second to speak
        time.sleep(0.05)
    if not (_job.board or _job.world.is_main) or not _claim():
        return
    _say(_lost(error))
    if not isinstance(error, errors.RankLostError) and not (_job.board and _job.board.dead_ranks()):
        _say_traceback(error, None)  # no rank has died, so that this may be where it began


def _failed(error: BaseException) -> errors.DistributedError:
    """For an error that is none of `zero_sft.errors`, on this rank."""
    said = f"{_here()} failed while {_stage(error)}: {type(error).__name__}: {error}"
    if is_device_memory(error):
        return errors.DistributedError(f"{said}\n{TOO_LITTLE_MEMORY}", code="cluster.device_memory")
    if is_host_memory(error):
        return errors.DistributedError(
            f"{said}\nThe host has too little memory. {TOO_LITTLE_MEMORY}", code="cluster.host_memory"
        )
    return errors.DistributedError(said, code="cluster.rank_failed")


def _lost(error: BaseException | None) -> errors.ZeroSftError:
    dead = _job.board.dead_ranks() if _job.board else {}
    host = socket.gethostname()
    if not dead and isinstance(error, errors.RankLostError):
        return error
    if not dead:
        reason = str(error).strip().splitlines()[0] if error and str(error).strip() else "no reason is known"
        return errors.DistributedError(
            f"{_here()} lost the connection to another rank while {_stage(error)}: {reason}\nA rank on another host has "
            "ended, or the network between the hosts has failed. The messages of the other hosts say more.",
            code="cluster.connection_lost",
        )
    ranks = ", ".join(f"rank {rank} (process {pid})" for rank, pid in dead.items())
    kills = kernel_kills() - _job.kills_before
    if kills > 0:
        cause = f"The kernel has killed {kills} process{'es' * (kills > 1)} on {host} for lack of host memory meanwhile. "
        cause += (
            "Use more hosts, fewer ranks on each, or less offloading to the host; python -m zero_sft.estimate tells the need."
        )
    else:
        cause = (
            "A signal has killed it: kill -9 by a person or the scheduler, a crash in native code, or lack of host memory "
            f"in its container (see dmesg on {host}, or the scheduler's account of the job)."
        )
    return errors.RankLostError(
        f"{ranks} on {host} ended while {_stage(error)}, and left no message. {cause}", code="cluster.rank_lost"
    )


def _claim() -> bool:
    """True for the first rank that asks; for the first of each host where the ranks' store has gone with rank 0."""
    return (_job.board is None or _job.board.claim()) and _is_first_host(otherwise=True)


def _is_first_host(*, otherwise: bool) -> bool:
    """True if no rank of another host has claimed to speak; `otherwise` if rank 0, which holds the ranks' store, is gone."""
    if len(set(_job.world.node_leaders)) < 2:
        return True
    answers: list[int] = []

    def ask() -> None:
        import torch

        with contextlib.suppress(Exception):
            store = torch.distributed.distributed_c10d._get_default_store()
            answers.append(store.add("zero_sft/spoken", 1))

    thread = threading.Thread(target=ask, daemon=True)  # the call may wait long for a rank 0 that is gone
    thread.start()
    thread.join(FOLLOW_ON_SECONDS)
    return answers[0] == 1 if answers else otherwise


def _here() -> str:
    return f"rank {_job.world.rank} on {socket.gethostname()}"


def _stage(error: BaseException | None = None) -> str:
    """What the job did when `error` came, or does now."""
    if hasattr(error, _STAGE):
        return getattr(error, _STAGE)
    try:
        return _job.stage() if callable(_job.stage) else _job.stage
    except Exception:  # noqa: BLE001 - a message must come
        return "training"


def _say(error: errors.ZeroSftError) -> None:
    _print(error.with_code)


def _say_alone(error: errors.ZeroSftError) -> None:
    _print(f"{errors.without_tokens(str(error))} (rank {_job.world.rank} alone) [{error.code}]")


def _print(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"\nerror: {message}\n")
    sys.stderr.flush()


def _say_traceback(error: BaseException, path: Path | None) -> None:
    text = errors.without_tokens("".join(traceback.format_exception(error)))
    sys.stderr.write(f"The traceback{f', also in {path}' if path else ''}:\n{text}")
    sys.stderr.flush()


def _write_traceback(error: BaseException) -> Path | None:
    """Into the log folder, if there is one that can be written; the error itself matters more."""
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
