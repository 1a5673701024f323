"""Shared memory of a node's ranks, with which one of them claims to report a failure, even if others have died.

It is a file in shared memory that is unlinked once every rank has opened it, so that it disappears with the last process.
Left out: a store over the network, which disappears with rank 0.
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

_SHARED_MEMORY = Path("/dev/shm")


class NodeBoard:
    """The ranks of a node, their processes, and whether one of them has reported a failure.

    Args:
        path: a file of one byte, shared by all ranks of the node.
        processes: rank → (process id, start time), for the ranks of the node.
    """

    def __init__(self, path: Path, processes: dict[int, tuple[int, float]]) -> None:
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), 1)
        self._processes = processes

    def claim(self) -> bool:
        """Return True for the first caller on the node, which then reports for all."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            is_first = self._memory[0] == 0
            self._memory[0] = 1
            return is_first
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @property
    def is_claimed(self) -> bool:
        """True if a rank of the node has reported a failure or is about to."""
        return self._memory[0] != 0

    def dead_ranks(self) -> dict[int, int]:
        """Return rank → process id for the ranks of the node that have ended."""
        return {rank: pid for rank, (pid, started) in self._processes.items() if not _is_alive(pid, started)}


def describe_process() -> tuple[int, float]:
    """Return (process id, start time) of this process, for `NodeBoard`."""
    process = psutil.Process()
    return process.pid, process.create_time()


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def open_board(leader: int, rank: int, node_ranks: Sequence[int], exchange: Callable[[Any], list[Any]]) -> NodeBoard | None:
    """Open the board of this rank's node; None if its ranks can't see each other's files. Every rank; communicates.

    Args:
        leader: the rank that creates the file.
        node_ranks: the ranks on this node, including `rank`.
        exchange: an all-gather of JSON values, in rank order.
    """
    path = None
    if rank == leader:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="zero_sft-board-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
            os.write(handle, b"\0")
            os.close(handle)
            path = Path(name)
    gathered = exchange([str(path or ""), *describe_process()])
    processes = {node_rank: (int(gathered[node_rank][1]), float(gathered[node_rank][2])) for node_rank in node_ranks}
    board = None
    with contextlib.suppress(OSError, ValueError):
        board = NodeBoard(Path(gathered[leader][0]), processes) if gathered[leader][0] else None
    exchange(None)  # every rank has opened the file
    if path is not None:
        path.unlink(missing_ok=True)
    return board
