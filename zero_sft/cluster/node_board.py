"""Shared memory of a node's ranks, with which one of them claims to report a failure, even if others have died.

It is a file in shared memory that is unlinked once every rank has opened it, so that it disappears with the last process.
Left out: a store over the network, which disappears with rank 0.
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from zero_sft.cluster.node_layout import SHARED_MEMORY
from zero_sft.cluster.world import World


class NodeBoard:
    """The ranks of a node, their processes, and whether one of them has reported a failure.

    Args:
        path: a file of one byte, shared by all ranks of the node.
        processes: the process of each rank of the node.
    """

    def __init__(self, path: Path, processes: dict[int, psutil.Process]) -> None:
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
        return {rank: process.pid for rank, process in self._processes.items() if not is_alive(process)}


def is_alive(process: psutil.Process) -> bool:
    """Return True if the process, and not a later one with its id, is running."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def open_board(world: World, all_gather: Callable[[World, Any], list[Any]]) -> NodeBoard | None:
    """Open the board of this rank's node; None if its ranks can't see each other's files. Every rank; communicates.

    Args:
        world: the world with its node layout.
        all_gather: `all_gather_json`.
    """
    path, leader = None, world.node_leader
    if world.leads_node:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="zero_sft-board-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
            os.write(handle, b"\0")
            os.close(handle)
            path = Path(name)
    paths, pids = zip(*all_gather(world, [str(path or ""), os.getpid()]), strict=True)
    board = None
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        node_ranks = [rank for rank, rank_leader in enumerate(world.node_leaders) if rank_leader == leader]
        board = NodeBoard(Path(paths[leader]), {rank: psutil.Process(pids[rank]) for rank in node_ranks})
    all_gather(world, None)  # every rank has opened the file
    if path is not None:
        path.unlink(missing_ok=True)
    return board
