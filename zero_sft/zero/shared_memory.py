"""Remove DeepSpeed's files in /dev/shm as soon as every rank has mapped them.

On CPU ranks, DeepSpeed's communication backend creates one shared-memory file of about 69 MB per rank and never removes it. The
files are named after the user and the master's address and port, so they accumulate over runs and fill the node's memory.
A mapped file can be unlinked at once: its memory is freed when the last process that maps it ends, however that happens.
"""

import contextlib
import os
from pathlib import Path

_FOLDER = Path("/dev/shm")


def unlink_shared_memory(rank: int) -> None:
    """Remove this rank's file. Every rank; does not communicate. Call it after a barrier that follows the backend's start."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with contextlib.suppress(FileNotFoundError, PermissionError):
        (_FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink()
