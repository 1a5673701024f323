"""Exchange two folders in one step: Linux's `renameat2(RENAME_EXCHANGE)`, which Python does not offer.

There is no moment at which one of the two names is missing. ext4, xfs, btrfs, tmpfs and overlayfs support it. NFS and many
network file systems do not: `is_supported` asks before anything depends on it.
"""

import ctypes
import os
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def exchange(one: Path, other: Path) -> None:
    """Let two paths of one file system swap what they name, atomically.

    Raises:
        OSError: with the path `other`; EINVAL or ENOSYS where the file system or the kernel does not support it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(38, os.strerror(38), str(other))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def is_supported(folder: Path) -> bool:
    """Try it on two new folders inside `folder`, and remove them."""
    one, other = folder / ".exchange-one", folder / ".exchange-other"
    one.mkdir()
    other.mkdir()
    try:
        exchange(one, other)
    except OSError:
        return False
    finally:
        one.rmdir()
        other.rmdir()
    return True
