"""List the checkpoints of a run, and verify their files.

python -m zero_sft.checkpoints runs/my-run --verify
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.console.progress import format_bytes
from zero_sft.errors import ArgumentError, CheckpointError
from zero_sft.options.command import Command
from zero_sft.options.spec import specs_of
from zero_sft.printable import first_of, printable, with_count

if TYPE_CHECKING:
    from zero_sft.checkpoint.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ListArguments:
    """Options of the list."""

    run: str | None = field(default=None, metadata={"help": "The run's --output_dir, or one checkpoint."})
    verify: bool = field(
        default=False, metadata={"help": "Read all files, and compare them with the checksums that were saved with them."}
    )


def command() -> Command:
    """Return the command and its options."""
    return Command(
        program="python -m zero_sft.checkpoints",
        description="List the checkpoints of a run, the newest first: step, size, loss, and whether they are complete.",
        groups={"Options": list(specs_of(ListArguments).values())},
        required={"run": "the run's --output_dir"},
        positional=("run",),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status: 1 if a checkpoint is not complete."""
    problems: list[str] = []

    def action(options: Any, notes: Sequence[str]) -> None:
        problems.extend(_print_list(Path(options.run).expanduser(), verify=options.verify))

    return command().run(argv, action) or bool(problems)


def _print_list(folder: Path, *, verify: bool) -> list[str]:
    """Print a line for each checkpoint; return the reasons why some are not complete."""
    from zero_sft.saving.checkpoint_folders import leftovers, newest_first
    from zero_sft.saving.trainer_checkpoint import has_states

    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}. Name a run's --output_dir.", code="resume.no_such_folder")
    folders = [folder] if has_states(folder) else newest_first(folder)
    if not folders:
        raise ArgumentError(f"{folder} has no checkpoint-* folders.", code="resume.no_checkpoint")
    rows = [_describe(each, verify=verify) for each in folders]
    header = ("checkpoint", "saved (UTC)", "ranks", "samples", "loss", "size", "state")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        sys.stdout.write(
            printable("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()) + "\n"
        )
    for path in leftovers(folder):
        sys.stdout.write(printable(f"{path.name}: a checkpoint that is being written, or was when its run was killed") + "\n")
    return [row[-1] for row in rows if not row[-1].startswith(_COMPLETE)]


_COMPLETE = "complete"


def _describe(folder: Path, *, verify: bool) -> tuple[str, ...]:
    """Return the cells of a checkpoint's line."""
    import datetime

    from zero_sft.checkpoint.manifest import has_manifest, read_manifest
    from zero_sft.saving.checkpoint_folders import folder_bytes, saved_at
    from zero_sft.saving.trainer_checkpoint import has_states

    saved = datetime.datetime.fromtimestamp(saved_at(folder)[0], datetime.UTC).strftime("%Y-%m-%d %H:%M")
    size, state = format_bytes(folder_bytes(folder)), _state(folder, verify=verify)
    if not has_manifest(folder):
        form = " (DeepSpeed's format)" if has_states(folder) else ""
        return folder.name, saved, "?", "?", "?", size, state + form
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return folder.name, saved, "?", "?", "?", size, state
    loss = "?" if manifest.loss is None else f"{manifest.loss:.3f}"
    return folder.name, saved, str(manifest.world_size), f"{manifest.samples:,}", loss, size, state


def _state(folder: Path, *, verify: bool) -> str:
    """Say whether a checkpoint is complete, and if not, why."""
    from zero_sft.checkpoint.manifest import find_damage, has_manifest, read_manifest
    from zero_sft.saving.trainer_checkpoint import (
        WEIGHTS_ALONE,
        IncompleteCheckpointError,
        inspect_checkpoint,
        require_intact,
    )

    try:
        checkpoint = inspect_checkpoint(folder)
        if verify and has_manifest(folder):
            manifest = read_manifest(folder)
            damage = find_damage(folder, manifest, verify=True)
            if damage:
                return f"not complete: {damage}"
            others = _elsewhere(manifest, folder)
            here = [name for name in manifest.files if (folder / name).is_file()]
            return f"{_COMPLETE}{others}, {with_count(len(here), 'file')} verified"
        if verify:
            paths = dict.fromkeys(path for rank in range(checkpoint.world_size) for path in checkpoint.own_files(rank))
            for path in paths:
                require_intact(path)
            return f"{_COMPLETE}, {with_count(len(paths), 'file')} verified"
    except (IncompleteCheckpointError, ArgumentError) as error:
        if error.code == WEIGHTS_ALONE:
            return f"{_COMPLETE}: weights alone (--save_only_model), from which no run resumes"
        return f"not complete: {error}"
    return _COMPLETE + (_elsewhere(read_manifest(folder), folder) if has_manifest(folder) else "")


def _elsewhere(manifest: "Manifest", folder: Path) -> str:
    """Say which hosts have the files that this host's folder lacks; "" if it lacks none."""
    from zero_sft.checkpoint.manifest import hosts_of_missing_files

    missing = hosts_of_missing_files(folder, manifest)
    if not missing:
        return ""
    return f" on this host; {with_count(len(missing), 'file')} on {first_of(sorted(set(missing.values())))}"
