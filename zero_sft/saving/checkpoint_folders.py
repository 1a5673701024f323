"""The `checkpoint-N` folders of a run in the order of their age, which of them to remove, and what killed runs have left.

A run that resumes from an earlier checkpoint writes folders with lower numbers than those that were there. So age decides, not
the number. Everything here runs on rank 0 and does not communicate.
"""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterable, Set
from pathlib import Path

from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.checkpoint.manifest import MANIFEST_FILE
from zero_sft.checkpoint.run_state import TRAINER_STATE_FILE

PARTIAL_SUFFIX = ".partial"
"""The end of the names of hidden folders with checkpoints that are being written or removed."""

FORMER_SUFFIX = ".former"
"""The end of the name that a complete checkpoint has while another one takes its place."""


def saved_at(folder: Path) -> tuple[float, str]:
    """Return when a checkpoint was complete, in seconds since 1970, and its name; as a key to sort by.

    Its manifest says so. Without one, it is the time of the file that the Trainer writes last, else that of the folder.
    """
    manifest = folder / MANIFEST_FILE
    if manifest.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return datetime.datetime.fromisoformat(json.loads(manifest.read_bytes())["written"]).timestamp(), folder.name
    for path in (folder / TRAINER_STATE_FILE, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime, folder.name
    return 0.0, folder.name


def newest_first(output: Path) -> list[Path]:
    """Return the `checkpoint-N` folders in a folder, which need not exist; the one that was saved last comes first."""
    return sorted(checkpoints_in(output), key=saved_at, reverse=True)


def next_date(output: Path) -> str:
    """Return the time now, in UTC (ISO 8601), or a later one than that of every checkpoint there, if clocks differ."""
    now = datetime.datetime.now(datetime.UTC)
    for newest in newest_first(output)[:1]:
        with contextlib.suppress(OverflowError, ValueError, OSError):
            after = datetime.datetime.fromtimestamp(saved_at(newest)[0], datetime.UTC) + datetime.timedelta(milliseconds=1)
            now = max(now, after)
    return now.isoformat(timespec="milliseconds")


def surplus(folders: Iterable[Path], limit: int | None, kept: Set[Path]) -> list[Path]:
    """Return the checkpoints beyond a limit, the oldest first. Those to be kept count, and are never among them.

    Args:
        limit: `save_total_limit`; None or below 1: all are kept.
        kept: the checkpoint that was saved last, and the best one.
    """
    if limit is None or limit < 1:
        return []
    names = {folder.resolve() for folder in kept}
    everything = sorted(folders, key=saved_at)
    others = [folder for folder in everything if folder.resolve() not in names]
    return others[: max(0, len(everything) - limit)]


def remove(folder: Path) -> None:
    """Remove a checkpoint as far as possible; of a link, the link alone."""
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
    else:
        hidden = folder.with_name(f".{folder.name}.removed{PARTIAL_SUFFIX}")  # a run that is killed leaves no broken checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rename(hidden)
            folder = hidden
        shutil.rmtree(folder, ignore_errors=True)


def restore_former(output: Path) -> list[Path]:
    """Restore checkpoints that a run was replacing when it was killed, unless the new one is in place. Return the restored."""
    restored: list[Path] = []
    for former in sorted(output.glob(f".checkpoint-*{FORMER_SUFFIX}")):
        target = output / former.name[1:].partition(".")[0]
        if os.path.lexists(target):
            remove(former)
        elif former.is_dir():
            former.rename(target)
            restored.append(target)
    return restored


def leftovers(output: Path) -> list[Path]:
    """Return the hidden folders of checkpoints that were being written or removed when their run was killed."""
    return sorted(output.glob(f".checkpoint-*{PARTIAL_SUFFIX}"))


def folder_bytes(folder: Path) -> int:
    """Return the total bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
