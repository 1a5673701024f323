"""Which file it was: kept with its header and compared when its data is read, as offsets mean nothing in another file."""

import os
from dataclasses import dataclass

from zero_sft.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A file's identity and the time of its last write, as this machine sees them. Not comparable between nodes.

    The inode's own time of change is left out: rights and links change it, too, and a write that puts the file's time back is
    somebody's intent.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


def stat_identity(file: str | os.PathLike[str] | int) -> FileIdentity:
    """The stamp of a path or an open file.

    Raises:
        CheckpointError: it can't be looked at.
    """
    try:
        found = os.stat(file)  # noqa: PTH116 - an open file's descriptor too
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be looked at: {error.strerror}. Check that it exists and its rights.",
            code="checkpoint.file_unreadable",
        ) from error
    return FileIdentity(device=found.st_dev, inode=found.st_ino, size_bytes=found.st_size, mtime_ns=found.st_mtime_ns)


def is_same_file(path: str, expected: FileIdentity) -> bool:
    """Whether a path still names that file, changed or not."""
    try:
        found = stat_identity(path)
    except CheckpointError:
        return False
    return (found.device, found.inode) == (expected.device, expected.inode)


def require_unchanged(path: str, file: str | os.PathLike[str] | int, expected: FileIdentity | None) -> None:
    """Raise `CheckpointError` if `file` (`path`, or that file opened) is another than the one whose header was read."""
    if expected is not None and stat_identity(file) != expected:
        raise CheckpointError(
            f"{path} was replaced or written to after its header was read. Wait until nothing writes the checkpoint any more "
            "(a download, a copy, another job's export), and load again.",
            code="checkpoint.changed_while_read",
        )
