"""A few bytes that the ranks of a node share, so that one of them speaks when the job fails, for whichever has died.

A file in shared memory, unlinked as soon as every rank has it open: it goes away with the last process, however that ends.
Left out: a store over the network, which goes away with rank 0.
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
    """The ranks of a node and their processes, and whether one of them has spoken.

    Args:
        path: a file of one byte, the same for all ranks of the node.
        processes: rank → process id and time of its start, of the ranks of the node.
    """

    def __init__(self, path: Path, processes: dict[int, tuple[int, float]]) -> None:
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), 1)
        self._processes = processes

    def claim(self) -> bool:
        """True for the first caller on the node, which then speaks for all."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            first = self._memory[0] == 0
            self._memory[0] = 1
            return first
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @property
    def is_claimed(self) -> bool:
        """True if a rank of the node has spoken or is about to."""
        return self._memory[0] != 0

    def dead_ranks(self) -> dict[int, int]:
        """Rank → process id of the node's ranks that have ended."""
        return {rank: pid for rank, (pid, started) in self._processes.items() if not _is_alive(pid, started)}


def describe_process() -> tuple[int, float]:
    """This process's id and the time of its start, for `NodeBoard`."""
    own = psutil.Process()
    return own.pid, own.create_time()


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def open_board(leader: int, rank: int, node_ranks: Sequence[int], exchange: Callable[[Any], list[Any]]) -> NodeBoard | None:
    """The board of this rank's node, or None where its ranks can't see each other's files. Every rank; communicates.

    Args:
        leader: the rank that makes the file.
        node_ranks: the ranks on this node, `rank` among them.
        exchange: gives every rank's JSON value to all, in rank order.
    """
    path = None
    if rank == leader:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="zero_sft-board-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
            os.write(handle, b"\0")
            os.close(handle)
            path = Path(name)
    told = exchange([str(path or ""), *describe_process()])
    processes = {other: (int(told[other][1]), float(told[other][2])) for other in node_ranks}
    board = None
    with contextlib.suppress(OSError, ValueError):
        board = NodeBoard(Path(told[leader][0]), processes) if told[leader][0] else None
    exchange(None)  # all have it open
    if path is not None:
        path.unlink(missing_ok=True)
    return board
