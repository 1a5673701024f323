"""The identity of a file, to detect that it changed between reading its header and reading its data.

The offsets in a header are wrong for any other file, so the identity is stored with the header and compared later.
"""

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass

from zero_sft.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A file's identity and the time of its last write, as this machine sees them. Not comparable between nodes.

    The inode change time (ctime) is left out, because changes of permissions and links update it as well. A write that
    restores the modification time is therefore not detected.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@contextlib.contextmanager
def explain_read_errors(file: str | os.PathLike[str] | int) -> Generator[None]:
    """Raise `CheckpointError` in place of an `OSError` of the body, which opens or reads `file`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read: {error.strerror or error}. Check that the file exists and that you may read it.",
            code="checkpoint.file_unreadable",
        ) from error


def stat_identity(file: str | os.PathLike[str] | int) -> FileIdentity:
    """Return the identity of a path or of an open file.

    Raises:
        CheckpointError: the file does not exist or can't be accessed.
    """
    with explain_read_errors(file):
        status = os.stat(file)  # noqa: PTH116 - Path.stat takes no file descriptor
    return FileIdentity(device=status.st_dev, inode=status.st_ino, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def require_unchanged(path: str, file: str | os.PathLike[str] | int, expected: FileIdentity | None) -> None:
    """Check that `file` (a path or a descriptor) is still the file whose header was read. `path` is for the message.

    Raises:
        CheckpointError: the file was replaced or written to.
    """
    if expected is not None and stat_identity(file) != expected:
        raise CheckpointError(
            f"{path} was replaced or written to after its header was read. Wait until nothing writes to the checkpoint any "
            "more (a download, a copy, another job's export), then load again.",
            code="checkpoint.changed_while_read",
        )
