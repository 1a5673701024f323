"""DeepSpeed's files in /dev/shm, removed as soon as every rank has them open.

On CPU ranks DeepSpeed's communication backend makes one shared-memory file of some 69 MB a rank, named after the user, the
master's address and port, and never removes it: runs add up until the node's memory is full. A mapped file can be unlinked
at once; its memory goes with the last process that maps it, however that process ends.
"""

import contextlib
import os
from pathlib import Path

_FOLDER = Path("/dev/shm")


def unlink_own(rank: int) -> None:
    """Remove this rank's file. Call it when all ranks have initialised the backend (after a barrier)."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with contextlib.suppress(FileNotFoundError, PermissionError):
        (_FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink()
