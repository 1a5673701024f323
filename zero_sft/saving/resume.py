"""Find the checkpoint that a run goes on from, and look at all of it before the weights are read."""

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.saving.trainer_checkpoint import WEIGHTS_ALONE, NotWholeError, TrainerCheckpoint, inspect

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def agree_on_checkpoint(
    wanted: str | bool | None, output_dir: str | Path, world: World, ds_config: Mapping[str, Any], bf16: bool | None = None
) -> TrainerCheckpoint | None:
    """The checkpoint to resume from, or None for a new run: the same on every rank. Every rank; communicates.

    Rank 0 looks at every file; the others look for what they will read.

    Raises:
        ArgumentError: as `find_checkpoint`; or a rank does not see its files.
    """
    if wanted is None or wanted is False:
        return None
    with collective_stage(world, "looking at the checkpoint") as stage:
        if world.is_main:
            found = find_checkpoint(wanted, output_dir, world.world_size, ds_config, bf16)
            stage.local = [str(found.folder), found.global_step, found.world_size, found.bf16]
    folder, step, world_size, in_bf16 = stage.gathered[0]
    found = TrainerCheckpoint(folder=Path(folder), global_step=step, world_size=world_size, bf16=in_bf16)
    with collective_stage(world, "looking at the checkpoint"):
        for path in found.files_of(world.rank):
            if not path.is_file():
                raise ArgumentError(
                    f"--resume_from_checkpoint {wanted}: rank {world.rank} does not see {path}, which rank 0 sees. Put the "
                    "checkpoint on a file system that all ranks share.",
                    code="resume.folder_not_shared",
                )
    return found


def require_resumable(wanted: str | bool | None, output_dir: str | Path, world_size: int) -> None:
    """Raise `ArgumentError` unless a run of that size can resume from `wanted`; None and False ask for nothing. Rank 0."""
    if wanted is not None and wanted is not False:
        find_checkpoint(wanted, output_dir, world_size)


def find_checkpoint(
    wanted: str | bool,
    output_dir: str | Path,
    world_size: int,
    ds_config: Mapping[str, Any] | None = None,
    bf16: bool | None = None,
) -> TrainerCheckpoint:
    """The folder `wanted`, or for True the newest whole checkpoint in `output_dir`. Rank 0.

    Args:
        ds_config: this run's, as `inspect` takes it.
        bf16: whether this run's engine is a bf16 one; None: not known.

    Raises:
        ArgumentError: no checkpoint, not a whole one, or one of another number of ranks or another precision.
    """
    asked = f"--resume_from_checkpoint {wanted}"
    found = (
        _newest(asked, Path(output_dir).expanduser(), ds_config)
        if wanted is True
        else _named(asked, Path(str(wanted)).expanduser(), ds_config)
    )
    if found.world_size != world_size:
        raise ArgumentError(
            f"{asked}: {found.folder} was written by {found.world_size} ranks, and here are {world_size}; ZeRO's state is cut "
            "for their number. Start as many ranks, or train on from its weights with a new optimizer: "
            + _weights(found.folder),
            code="resume.other_world_size",
        )
    if bf16 is not None and bf16 is not found.bf16:
        there, here = ("bf16", "fp32 or fp16") if found.bf16 else ("fp32 or fp16", "bf16")
        raise ArgumentError(
            f"{asked}: {found.folder} was trained in {there}, and this run trains in {here}. Give --bf16 {found.bf16}.",
            code="resume.other_dtype",
        )
    return found


def _weights(folder: Path) -> str:
    """The commands that make a checkpoint a model to start from, next to the config and tokenizer that it holds."""
    return (
        f"`python -m deepspeed.utils.zero_to_fp32 {folder} {folder}` adds them to the folder, then give "
        f"--model_name_or_path {folder} and another --output_dir instead of --resume_from_checkpoint."
    )


def _named(asked: str, folder: Path, ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    if not folder.is_dir():
        raise ArgumentError(f"{asked}: no folder {folder}. Leave it out to start anew.", code="resume.no_such_folder")
    try:
        return inspect(folder, ds_config)
    except NotWholeError as error:
        raise ArgumentError(f"{asked}: {_unusable(folder, error)}", code=error.code) from error


def _unusable(folder: Path, error: NotWholeError) -> str:
    if error.code == WEIGHTS_ALONE:
        return (
            f"{folder} can't be resumed from: {error}. Train on from these weights with a new optimizer: --model_name_or_path "
            f"{folder} and another --output_dir instead of --resume_from_checkpoint."
        )
    others = [str(path) for path in _newest_first(folder.parent) if path != folder and _is_whole(path)]
    remedy = f"Name {others[0]}, which is whole" if others else "Name another checkpoint-* folder"
    return f"{folder} can't be resumed from: {error}. {remedy}, or leave --resume_from_checkpoint out to start anew."


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(NotWholeError, OSError):
        inspect(folder)
        return True
    return False


def _newest(asked: str, output_dir: Path, ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    """The newest whole one; those that are passed over are named in the log."""
    problems: list[tuple[Path, NotWholeError]] = []
    for folder in _newest_first(output_dir):
        try:
            found = inspect(folder, ds_config)
        except NotWholeError as error:
            problems.append((folder, error))
            continue
        for path, error in problems:
            logger.warning("%s is passed over, since it is not whole: %s", path, error.with_code)
        return found
    if not problems:
        raise ArgumentError(
            f"{asked}: no checkpoint-* folder in {output_dir}. Leave it out to start anew.", code="resume.no_checkpoint"
        )
    folder, error = problems[0]
    if error.code == WEIGHTS_ALONE or len(problems) == 1:
        raise ArgumentError(f"{asked}: {_unusable(folder, error)}", code=error.code)
    lines = "\n".join(f"  {path.name}: {error.with_code}" for path, error in problems)
    raise ArgumentError(
        f"{asked}: no checkpoint in {output_dir} is whole. Leave it out to start anew.\n{lines}",
        code="resume.no_whole_checkpoint",
        listed=[error.code for _, error in problems],
    )


def _newest_first(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, the highest number first."""
    numbered = [
        (int(found[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]
