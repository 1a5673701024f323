"""Temporary folders that name their process, so that those of killed processes are removed later."""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

_ABANDONED_SECONDS = 3 * 24 * 3600


_own: set[Path] = set()
"""The folders that this process has made with `make` and not removed, until it ends."""


def make(root: Path, kind: str) -> Path:
    """Make a folder of a kind for this process, after removing those of killed ones; raises `OSError`."""
    remove_abandoned(root, kind)
    folder = Path(tempfile.mkdtemp(prefix=prefix(kind), dir=root))
    _own.add(folder)
    return folder


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    _own.discard(folder)


def remove_own() -> None:
    """Remove all folders that this process has made."""
    for folder in list(_own):
        remove(folder)


def prefix(kind: str) -> str:
    """Return the prefix of this process's temporary folders of a kind, such as ".making-"."""
    return f"{_local_prefix(kind)}{os.getpid()}-"


def remove_abandoned(root: Path, kind: str) -> None:
    """Remove the folders of killed processes: at once if they ran on this machine, otherwise after some days."""
    for folder in root.glob(f"{kind}*"):
        with contextlib.suppress(FileNotFoundError):
            pid = folder.name.removeprefix(_local_prefix(kind)).split("-")[0]
            is_local = folder.name.startswith(_local_prefix(kind)) and pid.isdecimal()
            has_ended = is_local and not Path(f"/proc/{pid}").exists()
            if has_ended or time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _local_prefix(kind: str) -> str:
    """Return the prefix of folders whose process id is valid here: the same host and PID namespace."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{kind}{socket.gethostname()}-{namespace}-"
