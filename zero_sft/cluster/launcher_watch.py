"""End a rank when its launcher ends or a signal arrives, even in the middle of a collective.

The ranks would go on training after a launcher that was killed. DeepSpeed's `deepspeed` command leaves them behind on SIGTERM,
SIGINT and SIGHUP as well, unless it is our shim (`zero_sft.launcher`). So a thread in each rank watches the launchers among the
rank's ancestors. nohup, setsid, srun, ssh, or a shell that ends change nothing.

Python handles a signal between two instructions of the main thread, which may wait in native code for other ranks for a long
time. The thread receives the signal immediately (`signal.set_wakeup_fd`).
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from zero_sft.cluster import early_end, failure_report
from zero_sft.cluster.node_board import EarlyClaim, is_alive

POLL_SECONDS = 1.0

LEAVING_SECONDS = 10.0
"""Time for a rank that is already ending to finish after its launcher is gone."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_MODULES = frozenset(
    ["deepspeed.launcher.runner", "deepspeed.launcher.launch", "deepspeed.launcher.launcher_helper", "torch.distributed.run"]
    + ["torch.distributed.launch", "accelerate.commands.launch"]
)
_PROGRAMS = frozenset(["deepspeed", "ds", "torchrun", "accelerate", "mpirun", "mpiexec", "orterun", "prterun"])


class _Watch:
    """The watching thread of this process; `watch_launcher` sets it."""

    thread: threading.Thread | None = None
    wakeup: tuple[socket.socket, socket.socket] | None = None


def watch_launcher() -> None:
    """Start the watching thread; later calls do nothing. Call it from the main thread, as early as possible."""
    if _Watch.thread is not None and _Watch.thread.is_alive():  # False in a forked child
        return
    launchers = find_launchers(psutil.Process().parents())
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    _Watch.wakeup = (receiver, sender)
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:  # SIGHUP is ignored under nohup
                signal.signal(number, _handled_by_thread)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_in_child)
    _Watch.thread = threading.Thread(target=_watch, args=(launchers, receiver), name="zero_sft-watch", daemon=True)
    _Watch.thread.start()


def early_claim() -> EarlyClaim | None:
    """Return the claim that the ranks of this node share before they have joined; None if what started them is not known."""
    with contextlib.suppress(psutil.Error, OSError):
        ancestors = psutil.Process().parents()
        for process in [*find_launchers(ancestors), *(process for process in ancestors if process.name() == "slurmstepd")]:
            return EarlyClaim(process)
    return None


def find_launchers(ancestors: Sequence[psutil.Process]) -> dict[psutil.Process, str]:
    """Return the ancestors that start ranks and wait for them, and a description of each.

    `launch.sh` puts its process id into a variable.
    """
    launchers = {}
    for process in ancestors:
        with contextlib.suppress(psutil.Error):
            name = launcher_name(process.cmdline())
            if name is None and str(process.pid) == os.environ.get("ZERO_SFT_LAUNCHER_PID"):
                name = "launch.sh"
            if name is not None:
                launchers[process] = f"process {process.pid}, {name}"
    return launchers


def launcher_name(command: Sequence[str]) -> str | None:
    """Return the program or module of a command line if it starts ranks. It may stand behind options of the interpreter."""
    words = list(command)
    if words and Path(words[0]).name.startswith("python"):
        words.pop(0)
        while words and words[0].startswith("-"):
            option = words.pop(0)
            if option == "-m":
                return words[0] if words and words[0] in _MODULES else None
            if option in ("-X", "-W"):
                words = words[1:]
    name = Path(words[0]).name if words else ""
    return name if name in _PROGRAMS else None


def leave(status: int) -> None:
    """End this process and its children immediately, without destructors, which may wait for lost ranks."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _forget_in_child() -> None:
    """Restore default signal handling in a forked child (a DataLoader worker), which has no watching thread."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is _handled_by_thread:
            # SLURM sends SIGUSR1 to all processes of a task: the rank ends its workers itself, after the checkpoint.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)


def _handled_by_thread(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: a Python handler must be set for the interpreter to write to the wakeup descriptor."""


def _watch(launchers: Mapping[psutil.Process, str], receiver: socket.socket) -> None:
    while True:
        readable, _, _ = select.select([receiver], [], [], POLL_SECONDS)
        for number in receiver.recv(64) if readable else b"":
            is_handled_here = number in _SIGNALS and signal.getsignal(number) is _handled_by_thread
            is_failing = failure_report.is_failing()  # the launcher ends the ranks, since one has failed
            if is_handled_here and is_failing:
                failure_report.write_own_stacks("when another rank had failed")
            if is_handled_here and not is_failing and early_end.record(number):
                continue  # the training ends at a step
            if is_handled_here and failure_report.report_signal(signal.Signals(number).name):
                leave(128 + number)
        ended = next((process for process in launchers if not is_alive(process)), None)
        if ended is not None:
            if failure_report.report_orphan(launchers[ended]):
                leave(1)
            time.sleep(LEAVING_SECONDS)
            leave(1)  # this rank was already ending, but has not finished
