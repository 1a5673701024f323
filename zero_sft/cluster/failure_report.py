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
from zero_sft.cluster import early_end, restarts, watchdog
from zero_sft.cluster.failure_message import describe_dead_ranks, describe_failure, describe_lost_connection, kernel_kills
from zero_sft.cluster.node_board import EarlyClaim, NodeBoard
from zero_sft.cluster.world import World
from zero_sft.errors import Scope

FOLLOW_ON_SECONDS = 3.0
"""Time that a rank gives a lost peer to print its message first."""

EARLY_SECONDS = 30.0
"""Time that a rank of another node gives those of the first node to report an error from before the ranks have joined."""

TRAIN_LOG = "train.log"
"""Name of the file in the log folder with a copy of the log."""

_ACTIVITY = "_zero_sft_activity"
"""Attribute of an error that holds the activity in which it was raised."""

_LOST_PEER = re.compile(
    r"gloo|NCCL|HCCL|RCCL|Connection (closed|reset|refused)|Broken pipe|monitoredBarrier|Timed out waiting|recvValue",
    re.IGNORECASE,
)


@dataclass
class _Job:
    """State that the failure message needs, one per process. `run_rank`, `init_control_group` and the job set it."""

    world: World = field(default_factory=World)
    activity: str | Callable[[], str] = "starting"
    board: NodeBoard | None = None
    early: EarlyClaim | None = None
    logs: Path | None = None
    kills_before: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_leaving: bool = False


_job = _Job()


def begin_job(world: World, early: EarlyClaim | None = None) -> None:
    """Start with fresh state, dropping that of an earlier job in this process. Any rank; does not communicate.

    Args:
        early: decides which rank of the node reports a failure until `set_board` is called.
    """
    global _job
    _job = _Job(world=world, early=early, kills_before=kernel_kills())


def set_activity(activity: str | Callable[[], str]) -> None:
    """Set what the job is doing, such as "reading the weights", for the failure message."""
    _job.activity = activity


@contextlib.contextmanager
def activity(name: str) -> Iterator[None]:
    """Set the activity while the body runs, and attach it to an error that the body raises."""
    job, before, _job.activity = _job, _job.activity, name
    try:
        yield
    except BaseException as error:
        if errors.is_failure(error) and not hasattr(error, _ACTIVITY):
            setattr(error, _ACTIVITY, name)
        raise
    finally:
        job.activity = before


def set_board(world: World, board: NodeBoard | None) -> None:
    """Set the node's board, and the world that the ranks have agreed on."""
    _job.world, _job.board, _job.early = world, board, None


def set_log_folder(folder: Path) -> None:
    """Set the folder for the tracebacks of ranks that print nothing."""
    _job.logs = folder


def report_failure(error: BaseException) -> int:
    """Report an error once in the whole job, and return the exit status. For the outermost handler, on every rank."""
    with _leaving() as is_first:
        if is_first:
            _report_error(error)
    return early_end.EXIT_STATUS if isinstance(error, errors.EndedEarlyError) else 1


def report_interrupt() -> int:
    """Report that the user stopped the job, and return the exit status. For the outermost handler, on every rank."""
    with _leaving() as is_first:
        if is_first and _job.world.is_main and _claim_report():
            _report(errors.DistributedError(f"stopped by Ctrl-C (SIGINT) while {_activity()}.", code="cluster.interrupted"))
    return 128 + signal.SIGINT


def report_signal(name: str) -> bool:
    """Report that a signal ends this rank, unless another rank reports more; return False if this rank was already ending.

    Called by the thread that watches for signals.
    """
    with _leaving() as is_first:
        if is_first and not _another_rank_reports() and (_job.board or _job.world.is_main) and _claim_report():
            signalled = errors.DistributedError(
                f"{name} has ended the job while {_activity()}. The user, the launcher or the scheduler sent it.",
                code="cluster.ended_by_signal",
            )
            _report(_describe_loss(None) if _dead_ranks() else signalled)
        return is_first


def report_orphan(launcher: str) -> bool:
    """Report that the launcher has ended and this job with it; return False if this rank was already ending.

    Called by the thread that watches the launcher.
    """
    with _leaving() as is_first:
        if is_first and (_job.board or _job.world.local_rank == 0) and _claim_report():
            orphaned = errors.DistributedError(
                f"the launcher ({launcher}) has ended while {_activity()}, so its ranks end as well.",
                code="cluster.launcher_ended",
            )
            _report(orphaned)
        return is_first


def is_failing() -> bool:
    """Return whether a rank of this node has reported a failure, or has ended."""
    claim = _job.board or _job.early
    return (claim is not None and claim.is_claimed) or bool(_dead_ranks())


def report_stuck(describe: Callable[[], errors.ZeroSftError], what: str) -> None:
    """Write this rank's stacks, and let one rank report that a rank is stuck. For the watching thread, on every rank.

    Args:
        describe: makes the error, when all ranks have written their stacks.
        what: what the rank is doing.
    """
    write_own_stacks(what)
    with _leaving() as is_first:
        if is_first and (_job.board or _job.world.is_main) and _claim_report():
            time.sleep(watchdog.GATHER_SECONDS)
            _report(describe())
        elif is_first:
            time.sleep(watchdog.GATHER_SECONDS + FOLLOW_ON_SECONDS)  # a launcher ends all ranks when one has ended


def write_own_stacks(what: str) -> None:
    """Write the stacks of this rank's threads to the log folder, if there is one."""
    if _job.logs is not None:
        watchdog.write_stacks(_job.logs, _job.world.rank, what)


def mark_succeeded() -> None:
    """Mark the job as successful: the end of the launcher or of this rank is no longer a failure."""
    _job.is_leaving = True


@contextlib.contextmanager
def _leaving() -> Iterator[bool]:
    """Yield True in the first thread of this rank that reports; another thread waits until it has reported."""
    job = _job
    has_lock = job.lock.acquire(timeout=4 * FOLLOW_ON_SECONDS)  # a report that hangs, such as on a full pipe, must not keep us
    is_first, job.is_leaving = not job.is_leaving, True
    try:
        yield is_first
    finally:
        if has_lock:
            job.lock.release()


def _report_error(error: BaseException) -> None:
    """Report an error, or leave it to another rank."""
    if _follows_from_another(error):
        _write_traceback(error)
        _report_lost_rank(error)
    elif not isinstance(error, errors.ZeroSftError):
        path = _write_traceback(error)
        if _is_reporter(Scope.THIS_RANK):
            _report(describe_failure(error, here(), _activity(error)))
            _print_traceback(error, path)
    elif _is_reporter(error.scope):
        has_joined = _job.board is not None
        _report(error, is_alone=error.scope is Scope.THIS_RANK or (has_joined and not _job.world.is_main))
    elif error.scope is Scope.THIS_RANK:
        _write_traceback(error)


def _follows_from_another(error: BaseException) -> bool:
    """Return True for an error that a rank has when another rank is gone."""
    if isinstance(error, errors.ZeroSftError):
        return isinstance(error, errors.RankLostError)
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch's class, by name: torch is not imported here
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None and _job.world.world_size > 1


def _is_reporter(scope: Scope) -> bool:
    """Return True on the one rank that reports an error of this scope."""
    if scope is Scope.THIS_RANK or _job.world.is_main:
        return _claim_report()
    if scope is Scope.ALL_RANKS:
        return False
    if _job.board is None:
        # Not joined yet: most often all ranks have this error. The launcher ends the others when one has reported it.
        on_first_node = _job.world.rank == _job.world.local_rank
        return _job.early is not None and not _another_rank_reports(0 if on_first_node else EARLY_SECONDS) and _claim_report()
    if _another_rank_reports():
        return False
    return _claim_report(if_store_is_gone=False)


def _another_rank_reports(seconds: float | None = None) -> bool:
    """Give the other ranks some seconds to report first, and return True if one of this node has."""
    seconds = FOLLOW_ON_SECONDS if seconds is None else seconds
    start, claim = time.monotonic(), _job.board or _job.early
    if claim and claim.is_claimed:
        return True
    while _job.world.world_size > 1 and (waited := time.monotonic() - start) < seconds:
        if claim and claim.is_claimed:
            return True
        if waited > 0.5 and _dead_ranks():
            break  # the dead rank had half a second to report
        time.sleep(0.05)
    return False


def _report_lost_rank(error: BaseException) -> None:
    """Let one rank of the node report the loss, unless the lost rank reports."""
    if _another_rank_reports() or not (_job.board or _job.world.is_main) or not _claim_report():
        return
    _report(_describe_loss(error))
    if not isinstance(error, errors.RankLostError) and not _dead_ranks():
        _print_traceback(error, None)  # no rank has died, so this error may be the cause


def _dead_ranks() -> dict[int, int]:
    """Return rank → process id for the ranks of this node that have ended."""
    return _job.board.dead_ranks() if _job.board else {}


def _claim_report(*, if_store_is_gone: bool = True) -> bool:
    """Return True for the first rank of the job that calls; it reports.

    The hosts agree through the store of rank 0. If that is gone, the first rank of each host gets `if_store_is_gone`.
    """
    claim = _job.board or _job.early
    if claim is not None and not claim.claim():
        return False
    if len(set(_job.world.node_leaders)) < 2:
        return True
    answers: list[bool] = []

    def ask() -> None:
        import torch

        with contextlib.suppress(Exception):
            store = torch.distributed.distributed_c10d._get_default_store()
            answers.append(store.add("zero_sft/failure_reported", 1) == 1)

    thread = threading.Thread(target=ask, daemon=True)  # the call can hang if rank 0 is gone
    thread.start()
    thread.join(FOLLOW_ON_SECONDS)
    return answers[0] if answers else if_store_is_gone


def _describe_loss(error: BaseException | None) -> errors.ZeroSftError:
    dead = _dead_ranks()
    if dead:
        return describe_dead_ranks(dead, _activity(error), kernel_kills() - _job.kills_before)
    return error if isinstance(error, errors.RankLostError) else describe_lost_connection(error, here(), _activity(error))


def here() -> str:
    """Return this rank and its host, for a message."""
    return f"rank {_job.world.rank} on {socket.gethostname()}"


def _activity(error: BaseException | None = None) -> str:
    """Return the activity in which `error` was raised, or the present one."""
    if hasattr(error, _ACTIVITY):
        return getattr(error, _ACTIVITY)
    try:
        return _job.activity() if callable(_job.activity) else _job.activity
    except Exception:  # noqa: BLE001 - the report must not fail
        return "training"


def _report(error: errors.ZeroSftError, *, is_alone: bool = False) -> None:
    message = error.with_code
    restarts.note_error(error.code)
    if is_alone and _job.world.world_size > 1:
        message = f"{errors.without_tokens(str(error))} (rank {_job.world.rank} alone) [{error.code}]"
    sys.stdout.flush()
    title = "ended early" if isinstance(error, errors.EndedEarlyError) else "error"
    sys.stderr.write(f"\n{title}: {message}\n")
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        if _job.logs is not None and (_job.logs / TRAIN_LOG).exists():
            with (_job.logs / TRAIN_LOG).open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{title}: {message}\n")


def _print_traceback(error: BaseException, path: Path | None) -> None:
    sys.stderr.write(f"The traceback{f', also in {path}' if path else ''}:\n{_traceback(error)}")
    sys.stderr.flush()


def _write_traceback(error: BaseException) -> Path | None:
    """Write the traceback to the log folder if possible; a failure to write must not hide the error."""
    if _job.logs is None:
        return None
    path = _job.logs / f"error_rank_{_job.world.rank}.txt"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{here()}, process {os.getpid()}, while {_activity(error)}\n{_traceback(error)}")
        return path
    return None


def _traceback(error: BaseException) -> str:
    return errors.without_tokens("".join(traceback.format_exception(error)))
