"""Swap two folders in one step: Linux's `renameat2(RENAME_EXCHANGE)`, which Python does not offer.

Both names exist at every moment. ext4, xfs, btrfs, tmpfs and overlayfs support it. NFS and many other network file
systems do not: `is_supported` tests it before anything depends on it.
"""

import ctypes
import errno
import os
import tempfile
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def swap(first: Path, second: Path) -> None:
    """Swap two folders of one file system, atomically.

    Raises:
        OSError: the swap failed; EINVAL or ENOSYS if the file system or the kernel does not support it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(second))
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        error_number = ctypes.get_errno()
        raise OSError(error_number, os.strerror(error_number), str(second))


def is_supported(folder: Path) -> bool:
    """Test whether the file system of `folder` supports the swap, on two temporary folders inside it."""
    with tempfile.TemporaryDirectory(dir=folder) as first, tempfile.TemporaryDirectory(dir=folder) as second:
        try:
            swap(Path(first), Path(second))
        except OSError:
            return False
    return True
