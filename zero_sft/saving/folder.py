"""The folder that an export is written to, and the hidden draft that takes its place at the end.

A draft lives on the file system of its target, whatever the target is:

| the target | the draft | how it takes the target's place (`placing.py`) |
| --- | --- | --- |
| does not exist | next to it | one rename |
| a folder | next to it | the two folders are exchanged in one step |
| a mount point, the working directory, or where folders can't be exchanged | inside it | file by file |

Links are resolved first. Everything here runs on one rank and does not communicate.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from zero_sft.errors import ExportError, NotPlacedError
from zero_sft.saving.exchange_folders import is_supported

DRAFT_SUFFIX = ".part"


class Placing(StrEnum):
    """How a draft takes its target's place."""

    RENAME = "rename"
    EXCHANGE = "exchange"
    IN_PLACE = "in place"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingFolder:
    """A hidden folder that will take the place of `target`; both are resolved paths."""

    folder: Path
    target: Path
    placing: Placing

    @property
    def reference(self) -> list[str]:
        """What other ranks need to find this draft: links may resolve to other paths on their machines."""
        return [self.folder.name, self.placing, "inside" if self.folder.parent == self.target else "next to"]


def find_staging(path: str | Path, reference: list[str]) -> StagingFolder:
    """The draft that rank 0 made for the folder `path`, as this machine names it."""
    name, placing, where = reference
    target = resolved(path)
    parent = target if where == "inside" else target.parent
    return StagingFolder(folder=parent / name, target=target, placing=Placing(placing))


def resolved(path: str | Path) -> Path:
    """The folder itself, without links on the way, whether it exists or not."""
    return Path(path).expanduser().resolve()


def make_staging(path: str | Path) -> StagingFolder:
    """Make an empty draft for the folder `path`, on its file system. Rank 0.

    Raises:
        ExportError: `path` is a file, or holds an adapter that readers would load on top of the model.
        OSError: no rights, no room.
    """
    target = resolved(path)
    _require_usable(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return StagingFolder(folder=_new_folder(target.parent, target), target=target, placing=Placing.RENAME)
    beside = None if _holds_the_working_directory(target) else _next_to(target)
    if beside is not None:
        return StagingFolder(folder=beside, target=target, placing=Placing.EXCHANGE)
    return StagingFolder(folder=_new_folder(target, target), target=target, placing=Placing.IN_PLACE)


def _require_usable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file. Name a folder for the model.", code="export.target_is_a_file")
    if (target / "adapter_config.json").exists():
        raise ExportError(
            f"{target} holds an adapter (adapter_config.json), which transformers would load on top of the model that is "
            "written next to it. Name another folder.",
            code="export.target_holds_adapter",
        )


def _new_folder(parent: Path, target: Path) -> Path:
    folder = parent / f".{target.name}.{secrets.token_hex(4)}{DRAFT_SUFFIX}"
    folder.mkdir()
    return folder


def _next_to(target: Path) -> Path | None:
    """A new folder next to `target` that can be exchanged with it, or None.

    A rename into `target` is tried: it fails where `target` is a mount point, also a bind mount of the same file system.
    """
    try:
        folder = _new_folder(target.parent, target)
    except OSError:  # the folder may belong to the user, and its parent not
        return None
    inside = target / folder.name
    try:
        folder.rename(inside)
        inside.rename(folder)
        supported = is_supported(folder)
    except OSError as error:
        supported = False
        if error.errno != errno.EXDEV and not os.access(target, os.W_OK | os.X_OK):
            folder.rmdir()
            raise
    if supported:
        return folder
    folder.rmdir()
    return None


def _holds_the_working_directory(target: Path) -> bool:
    """True if an exchange would take away the folder that this job, or the user's shells, work in."""
    with contextlib.suppress(OSError, RuntimeError):
        return any(folder.resolve().is_relative_to(target) for folder in (Path.cwd(), Path.home()))
    return False


@contextlib.contextmanager
def writable_staging(path: str | Path) -> Iterator[StagingFolder]:
    """Make a draft for `path` as the end of the run will, and remove it afterwards. Rank 0.

    A target that did not exist is made for a moment, since the rename of the draft to it is tried as well: a run that fails
    now leaves nothing behind, but for parent folders.

    Raises:
        ExportError: the folder can't be made or written.
    """
    target = resolved(path)
    with explained(path):
        draft = make_staging(path)
    try:
        with explained(path):
            (draft.folder / "probe").write_bytes(b"0")
            if draft.placing is Placing.RENAME:
                draft.folder.rename(target)
                target.rename(draft.folder)
        yield draft
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)


def require_writable(path: str | Path) -> None:
    """Raise `ExportError` now, rather than after the training, if the folder `path` can't be made or written. Rank 0."""
    with writable_staging(path):
        pass


def leftover_stagings(path: str | Path) -> list[Path]:
    """The drafts for `path` that killed runs have left, or whose last step failed. Rank 0."""
    target = resolved(path)
    pattern = f".{target.name}.????????{DRAFT_SUFFIX}"
    return sorted(found for parent in (target.parent, target) if parent.is_dir() for found in parent.glob(pattern))


class explained:
    """Turn an OSError into an ExportError that names the folder and the remedy."""

    def __init__(self, target: str | Path) -> None:
        self._target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ExportError(
                f"{self._target} can't be written: {error.strerror or error} ({error.filename}). Name another --output_dir, "
                "with room for the model, that all ranks share.",
                code="export.unwritable",
            ) from error


class kept:
    """Turn an OSError of the last step into a NotPlacedError that names the finished draft."""

    def __init__(self, draft: StagingFolder) -> None:
        self._draft = draft

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise NotPlacedError(
                f"the model is complete in {self._draft.folder}, but could not take its place in {self._draft.target}: "
                f"{error.strerror or error} ({error.filename}). Move it there by hand, or load it from where it is.",
                code="export.not_placed",
            ) from error
