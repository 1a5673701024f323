"""Let one run at a time write to an output folder.

Two runs would remove each other's unfinished checkpoints and models. The lock is that of the operating system on a hidden
file, which a process loses when it ends, in any way; other hosts see it on NFS and on Lustre mounted with `flock`. Where a file
system has no locks, there is none.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from zero_sft.errors import ArgumentError
from zero_sft.printable import excerpt
from zero_sft.saving.folder import resolved

logger = logging.getLogger(__name__)

_BUSY = (errno.EACCES, errno.EAGAIN)


def lock_file(path: str | Path) -> Path:
    """Return the file of the lock on the folder `path`: next to it, or in it if it is a mount point or its parent read-only."""
    target = resolved(path)
    parent = target.parent
    if target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK | os.X_OK)):
        return target / ".lock"
    return parent / f".{target.name}.lock"


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the lock on an output folder, which need not exist. One rank; does not communicate.

    Raises:
        ArgumentError: another process holds it.
    """
    file = lock_file(path)
    handle = _acquire(file, path)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                file.unlink()  # before it is released: `_acquire` takes no file that is gone
            os.close(handle)


def _acquire(file: Path, path: str | Path) -> int | None:
    """Return the open file of the lock; None if the file system has no locks, or the file can't be made."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:  # the checks of the output folder say why it can't be written
            logger.debug("no lock on %s: %s", path, error)
            return None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(handle, file):
                _describe_holder(handle)
                return handle
        except OSError as error:
            if error.errno not in _BUSY:
                logger.debug("no lock on %s: %s", path, error)
                os.close(handle)
                return None
            holder = _holder(handle)
            os.close(handle)
            raise ArgumentError(
                f"--output_dir {path}: another run{holder} writes to this folder. Wait until it ends, or name another folder.",
                code="export.folder_in_use",
            ) from error
        os.close(handle)  # a run that has ended removed the file meanwhile


def _is_same(handle: int, file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), file.stat())
    return False


def _describe_holder(handle: int) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(), 0)


def _holder(handle: int) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(os.pread(handle, 4096, 0))
        return excerpt(f" (process {held['pid']} on {held['host']}, since {held['since']})")
    return ""
