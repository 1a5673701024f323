"""Make and find the hidden staging folder in which an export is written before it takes the place of its target.

A staging folder is always on the file system of its target:

| target | staging folder | preferred way to take the target's place |
| --- | --- | --- |
| does not exist | next to the target | `RENAME` |
| folder that can be swapped | next to the target | `SWAP` |
| mount point, working or home directory, or folder that can't be swapped | inside the target | `FILE_BY_FILE` |

`placing.py` explains the ways. It decides at the end of a run, since the target may have changed or a swap may fail.

Links are resolved first. Only `require_writable_everywhere` communicates; functions that write run on rank 0.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError, NotPlacedError
from zero_sft.paths import nearest_existing
from zero_sft.saving.swap_folders import is_supported

logger = logging.getLogger(__name__)

STAGING_SUFFIX = ".part"


class Placing(StrEnum):
    """The ways in which a staging folder takes its target's place."""

    RENAME = "rename"
    SWAP = "swap"
    FILE_BY_FILE = "file by file"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingFolder:
    """A hidden folder that will take the place of `target`; both are resolved paths.

    `preferred` is the way that seemed possible when the folder was made; `placing.put_in_place` may take another one.
    """

    folder: Path
    target: Path
    preferred: Placing

    @property
    def reference(self) -> list[str]:
        """The values by which other ranks find this folder. No full path: links may resolve differently on their machines."""
        return [self.folder.name, self.preferred]


def find_staging(path: str | Path, reference: list[str]) -> StagingFolder:
    """Find the staging folder that rank 0 made for the folder `path`, under its path on this machine."""
    name, preferred = reference
    target = resolved(path)
    parent = target if preferred == Placing.FILE_BY_FILE else target.parent
    return StagingFolder(folder=parent / name, target=target, preferred=Placing(preferred))


def resolved(path: str | Path) -> Path:
    """Resolve all links in a path, whether the folder exists or not.

    Raises:
        ExportError: the links form a loop, or `~NAME` is not a user.
    """
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{path} leads to no folder: {error}. Name another folder.", code="export.no_such_path") from error


def file_system_of(path: str | Path) -> int:
    """Return the number of the file system of a folder, or of the nearest folder above it that exists. Any rank.

    Raises:
        OSError: it can't be reached.
    """
    return nearest_existing(Path(path).expanduser()).stat().st_dev


def make_staging(path: str | Path) -> StagingFolder:
    """Make an empty staging folder for the folder `path`, on its file system. Rank 0.

    Raises:
        ExportError: `path` is a file.
        OSError: this user may not write there, or the disk is full.
    """
    target = resolved(path)
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file. Name a folder for the model.", code="export.target_is_a_file")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return StagingFolder(folder=_new_folder(target.parent, target), target=target, preferred=Placing.RENAME)
    swappable = None if _holds_working_or_home_directory(target) else _new_swappable_folder(target)
    if swappable is not None:
        return StagingFolder(folder=swappable, target=target, preferred=Placing.SWAP)
    return StagingFolder(folder=_new_folder(target, target), target=target, preferred=Placing.FILE_BY_FILE)


def _new_folder(parent: Path, target: Path) -> Path:
    folder = parent / f".{target.name}.{secrets.token_hex(4)}{STAGING_SUFFIX}"
    folder.mkdir()
    return folder


def _new_swappable_folder(target: Path) -> Path | None:
    """Make a folder next to `target` that can be swapped with it; None if that is not possible.

    A rename into `target` is tried, since it fails if `target` is a mount point, even a bind mount of the same file system.
    """
    try:
        folder = _new_folder(target.parent, target)
    except OSError:  # the user may own the folder but not its parent
        return None
    inside = target / folder.name
    try:
        folder.rename(inside)
        inside.rename(folder)
        can_swap = is_supported(folder)
    except OSError as error:
        folder.rmdir()
        if error.errno != errno.EXDEV and not os.access(target, os.W_OK | os.X_OK):
            raise
        return None
    if not can_swap:
        folder.rmdir()
        return None
    return folder


def _holds_working_or_home_directory(target: Path) -> bool:
    """Return whether a swap would replace the working directory of this job, or the home folder with the user's shells."""
    with contextlib.suppress(OSError, RuntimeError):
        return any(folder.resolve().is_relative_to(target) for folder in (Path.cwd(), Path.home()))
    return False


@contextlib.contextmanager
def writable_staging(path: str | Path) -> Iterator[StagingFolder]:
    """Rehearse the end of the run: make a staging folder for `path`, and remove it afterwards. Rank 0.

    If the target does not exist, the rename to it is rehearsed as well and undone. Nothing is left except parent folders.

    Raises:
        ExportError: the folder can't be made or written.
    """
    target = resolved(path)
    with explain_write_errors(path):
        staging = make_staging(path)
    try:
        with explain_write_errors(path):
            (staging.folder / "rehearsal").write_bytes(b"0")
            if staging.preferred is Placing.RENAME:
                staging.folder.rename(target)
                target.rename(staging.folder)
        yield staging
    finally:
        shutil.rmtree(staging.folder, ignore_errors=True)


def require_writable(path: str | Path) -> None:
    """Raise `ExportError` now, rather than after the training, if the folder `path` can't be made or written. Rank 0."""
    with writable_staging(path):
        pass


def _leftover_stagings(path: str | Path) -> list[Path]:
    """Find staging folders for `path` that were left by killed runs or whose last step failed. Rank 0."""
    target = resolved(path)
    pattern = f".{target.name}.????????{STAGING_SUFFIX}"
    return sorted(folder for parent in (target.parent, target) if parent.is_dir() for folder in parent.glob(pattern))


def require_writable_everywhere(path: str | Path, world: World, *, on_each_node: bool = False) -> bool:
    """Make a staging folder for `path`, let one rank of each node write to it, and remove it. Every rank; communicates.

    Leaves nothing behind except parent folders of `path`.

    Args:
        on_each_node: a node that does not see the folder may have another one, which is tried in the same way.

    Returns:
        Whether all nodes see one folder.

    Raises:
        ExportError: the folder can't be made or written, or is not visible on every node.
    """
    with contextlib.ExitStack() as stack:
        with collective_stage(world, "checking the output folder") as exchange:
            if world.is_main:
                for leftover in _leftover_stagings(path):
                    logger.warning("%s was left by a run that did not end well: move what you need, and remove it", leftover)
                exchange.local = stack.enter_context(writable_staging(path)).reference
        staging = find_staging(path, exchange.gathered[0])
        with collective_stage(world, "writing to the output folder") as exchange, explain_write_errors(path):
            exchange.local = sees_it = staging.folder.is_dir()
            if world.leads_node and not sees_it:
                if not on_each_node:
                    raise ExportError(
                        f"--output_dir {path} is not the same folder on all nodes: rank {world.rank} does not see what rank 0 "
                        "wrote there. Name a folder on a file system that all nodes share, or give --save_on_each_node True: "
                        "then each node keeps its ranks' part of a checkpoint, and rank 0 writes the model.",
                        code="export.folder_not_shared",
                    )
                require_writable(path)
            elif world.leads_node:
                (staging.folder / f"rank-{world.rank}").write_bytes(b"0")
    return all(exchange.gathered)


def require_usable_local_folder(path: Path) -> None:
    """Make the folder of `--local_save_dir`, if it is not there, and write to it. Any rank; does not communicate.

    Raises:
        ExportError: this rank can't write there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise ExportError(
            f"--local_save_dir {path} can't be written on {socket.gethostname()}: {error.strerror or error}. Name a folder on "
            "a disk that each node has, or leave it out: the copy is then in memory.",
            code="save.local_folder_unwritable",
        ) from error


def sync(path: Path) -> None:
    """Flush a file's content to disk, or a folder's entries if the file system can flush them.

    Raises:
        OSError: it failed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_write_errors(target: str | Path) -> Iterator[None]:
    """Turn an OSError into an ExportError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"{target} can't be written: {error.strerror or error}{name}. Name another --output_dir, "
            "with room for the model, that all ranks share.",
            code="export.unwritable",
        ) from error


@contextlib.contextmanager
def explain_not_placed(staging: StagingFolder) -> Iterator[None]:
    """Turn an OSError of the last step into a NotPlacedError that names the finished staging folder."""
    try:
        yield
    except OSError as error:
        raise NotPlacedError(
            f"the model is complete in {staging.folder}, but could not take its place in {staging.target}: "
            f"{error.strerror or error} ({error.filename}). Move it there by hand, or load it from where it is.",
            code="export.not_placed",
        ) from error
