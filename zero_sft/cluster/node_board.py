"""One rank of a node claims to report a failure, even if other ranks have died.

`NodeBoard` is for ranks that have joined: a file in shared memory that is unlinked once every rank has opened it, so that it
disappears with the last process. `EarlyClaim` is for ranks that fail before: a file that is named after their launcher.
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


class EarlyClaim:
    """Whether a rank of the node has reported a failure before the ranks have joined.

    Args:
        launcher: the process that has started all ranks of the node.
    """

    def __init__(self, launcher: psutil.Process) -> None:
        self._folder, self._prefix = Path(tempfile.gettempdir()), f"zero_sft-failed-{os.getuid()}-"
        self._name = f"{self._prefix}{launcher.pid}-{int(launcher.create_time())}"

    def claim(self) -> bool:
        """Return True for the first caller on the node. Remove what earlier jobs have left."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{self._prefix}*"):
                pid = path.name.removeprefix(self._prefix).partition("-")[0]
                if path.name != self._name and not psutil.pid_exists(int(pid)):
                    path.unlink(missing_ok=True)
        try:
            os.close(os.open(self._folder / self._name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        except FileExistsError:
            return False
        except OSError:
            return True  # reported twice is better than not at all
        return True

    @property
    def is_claimed(self) -> bool:
        """True if a rank of the node has reported a failure or is about to."""
        return (self._folder / self._name).exists()


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
            path = Path(name)
            try:
                os.write(handle, b"\0")
            except OSError:  # no room
                path.unlink()
                path = None
            finally:
                os.close(handle)
    paths, pids = zip(*all_gather(world, [str(path or ""), os.getpid()]), strict=True)
    board = None
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        node_ranks = [rank for rank, rank_leader in enumerate(world.node_leaders) if rank_leader == leader]
        board = NodeBoard(Path(paths[leader]), {rank: psutil.Process(pids[rank]) for rank in node_ranks})
    all_gather(world, None)  # every rank has opened the file
    if path is not None:
        path.unlink(missing_ok=True)
    return board
