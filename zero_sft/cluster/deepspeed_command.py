"""Fixes to DeepSpeed's runner that the shim of the `deepspeed` command (`zero_sft.launcher`) applies in its own process.

- Two jobs on one machine use different master ports. DeepSpeed's default port is the same for all jobs.
- SIGTERM, SIGUSR1, SIGINT and SIGHUP reach all ranks of this machine at once, which save a checkpoint and end. DeepSpeed's
  runner exits on them and leaves its child and the ranks running; its child ends the ranks one after the other, and kills each
  after 30 seconds.
- Arguments pass through pdsh unchanged. DeepSpeed quotes only blanks, so the remote shell interprets everything else.
- The exit status is not 0 if the node's launcher was killed.

Imports neither torch nor DeepSpeed. A DeepSpeed release without one of the patched names keeps its behaviour there.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_JOB_HOSTFILE = "/job/hostfile"


class _Processes:
    """Children of the runner in this process: `_Popen` adds them, the signal handler reads them."""

    started: list["_Popen"] = []  # noqa: RUF012 - the one list
    signal_number: int = 0


class _Popen(subprocess.Popen[bytes]):
    """A child process that is recorded in `_Processes`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _Processes.started.append(self)


def run(runner: Any) -> int:
    """Run `main` of `runner`, the module `deepspeed.launcher.runner`, and return the exit status of the command."""
    if hasattr(runner, "parse_args"):
        runner.parse_args = _with_free_port(runner.parse_args)
    if hasattr(runner, "PDSHRunner"):
        runner.PDSHRunner.parse_user_args = _quote_for_pdsh
    if getattr(runner, "subprocess", None) is subprocess:
        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _Popen})
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, _pass_on)
    status = runner.main()
    if _Processes.signal_number and not status:
        return 128 + _Processes.signal_number
    killed = [-process.returncode for process in _Processes.started if (process.returncode or 0) < 0]
    return int(status or 0) or (128 + killed[0] if killed else 0)


def _with_free_port(parse_args: Any) -> Any:
    def parse(args: Sequence[str] | None = None) -> Any:
        parsed = parse_args(args)
        words = list(sys.argv[1:] if args is None else args)
        launcher_words = words[: len(words) - len(getattr(parsed, "user_args", ())) - 1]
        is_port_given = any(word.partition("=")[0] == "--master_port" for word in launcher_words)
        hostfile = getattr(parsed, "hostfile", "")
        is_one_machine = not any(Path(name).is_file() for name in (hostfile, _JOB_HOSTFILE) if name)
        if is_one_machine and (not is_port_given or not is_free(parsed.master_port)):
            port = free_port()
            if is_port_given:
                sys.stderr.write(f"deepspeed: the master port {parsed.master_port} is taken, so this job takes {port}\n")
            parsed.master_port = port
        return parsed

    return parse


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port of this machine."""
    with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store: closed connections don't matter
        probe.bind(("", port))
        return True
    return False


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _quote_for_pdsh(self: Any) -> list[str]:
    """Quote the user's arguments for pdsh, which expands `%` sequences, and then for the remote shell."""
    return [shlex.quote(word).replace("%", "%%") for word in self.args.user_args]


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Send SIGTERM or SIGUSR1 to the ranks; the runner waits for its children as usual.

    Before there are ranks, or if all are on other machines, SIGTERM ends the runner's children.
    """
    _Processes.signal_number = number
    if number == signal.SIGINT and _is_in_foreground():
        return  # Ctrl-C: the terminal has already sent SIGINT to every process
    children = [process.pid for process in _Processes.started if process.returncode is None]
    if ranks := [rank for child in children for rank in _ranks_below(child)]:
        targets, number = ranks, signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
    else:
        targets, number = children, signal.SIGTERM
    for process in targets:
        with contextlib.suppress(OSError):
            os.kill(process, number)


def _ranks_below(launcher: int) -> list[int]:
    """Return the ranks that a node's launcher has started: it gives the variable CROSS_RANK to them alone."""
    ranks = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                if "CROSS_RANK" in process.environ():
                    ranks.append(process.pid)
    return ranks


def _is_in_foreground() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    return False
