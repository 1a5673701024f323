"""Find the checkpoint from which a run resumes, and check all of its files before the weights are read."""

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.saving.trainer_checkpoint import WEIGHTS_ALONE, IncompleteCheckpointError, TrainerCheckpoint, inspect_checkpoint

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def agree_on_checkpoint(
    wanted: str | bool | None, output_dir: str | Path, world: World, ds_config: Mapping[str, Any], bf16: bool | None = None
) -> TrainerCheckpoint | None:
    """Return the checkpoint to resume from, the same on every rank; None for a new run. Every rank; communicates.

    Rank 0 checks every file; each rank checks that it sees the files that it will read.

    Raises:
        ArgumentError: as in `find_checkpoint`, or a rank does not see its files.
    """
    if wanted is None or wanted is False:
        return None
    with collective_stage(world, "looking at the checkpoint") as exchange:
        if world.is_main:
            checkpoint = find_checkpoint(wanted, output_dir, world.world_size, ds_config, bf16)
            exchange.local = [str(checkpoint.folder), checkpoint.global_step, checkpoint.world_size, checkpoint.bf16]
    folder, step, world_size, in_bf16 = exchange.gathered[0]
    checkpoint = TrainerCheckpoint(folder=Path(folder), global_step=step, world_size=world_size, bf16=in_bf16)
    with collective_stage(world, "looking at the checkpoint"):
        for path in checkpoint.files_of(world.rank):
            if not path.is_file():
                raise ArgumentError(
                    f"--resume_from_checkpoint {wanted}: rank {world.rank} does not see {path}, which rank 0 sees. Put the "
                    "checkpoint on a file system that all ranks share.",
                    code="resume.folder_not_shared",
                )
    return checkpoint


def require_resumable(wanted: str | bool | None, output_dir: str | Path, world_size: int) -> None:
    """Raise `ArgumentError` unless `world_size` ranks can resume from `wanted`; accept None and False. Rank 0."""
    if wanted is not None and wanted is not False:
        find_checkpoint(wanted, output_dir, world_size)


def find_checkpoint(
    wanted: str | bool,
    output_dir: str | Path,
    world_size: int,
    ds_config: Mapping[str, Any] | None = None,
    bf16: bool | None = None,
) -> TrainerCheckpoint:
    """Return the checkpoint in the folder `wanted`, or for True the newest complete one in `output_dir`. Rank 0.

    Args:
        ds_config: this run's DeepSpeed config; `inspect_checkpoint` explains its use.
        bf16: whether this run's engine trains in bf16; None if that is not known.

    Raises:
        ArgumentError: there is no checkpoint, or it is incomplete, or of another number of ranks or another precision.
    """
    asked = f"--resume_from_checkpoint {wanted}"
    checkpoint = (
        _newest(asked, Path(output_dir).expanduser(), ds_config)
        if wanted is True
        else _named(asked, Path(str(wanted)).expanduser(), ds_config)
    )
    if checkpoint.world_size != world_size:
        raise ArgumentError(
            f"{asked}: {checkpoint.folder} was saved with {checkpoint.world_size} ranks, and this run has {world_size}. "
            "DeepSpeed's optimizer state can't be resharded. Start "
            f"{checkpoint.world_size} ranks, or continue from the weights with a new optimizer: "
            + _how_to_start_from_weights(checkpoint.folder),
            code="resume.other_world_size",
        )
    if bf16 is not None and bf16 is not checkpoint.bf16:
        former, current = ("bf16", "fp32 or fp16") if checkpoint.bf16 else ("fp32 or fp16", "bf16")
        raise ArgumentError(
            f"{asked}: {checkpoint.folder} was trained in {former}, and this run trains in {current}. "
            f"Give --bf16 {checkpoint.bf16}.",
            code="resume.other_dtype",
        )
    return checkpoint


def _how_to_start_from_weights(folder: Path) -> str:
    """Give the commands that add weights to a checkpoint, so that a new run can start from it as from a model."""
    return (
        f"`python -m deepspeed.utils.zero_to_fp32 {folder} {folder}` adds them to the folder, then give "
        f"--model_name_or_path {folder} and another --output_dir instead of --resume_from_checkpoint."
    )


def _named(asked: str, folder: Path, ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    if not folder.is_dir():
        raise ArgumentError(
            f"{asked}: no folder {folder}. Leave the option out to start from scratch.", code="resume.no_such_folder"
        )
    try:
        return inspect_checkpoint(folder, ds_config)
    except IncompleteCheckpointError as error:
        raise ArgumentError(f"{asked}: {_unusable(folder, error)}", code=error.code) from error


def _unusable(folder: Path, error: IncompleteCheckpointError) -> str:
    if error.code == WEIGHTS_ALONE:
        return (
            f"{folder} can't be resumed from: {error}. Continue from these weights with a new optimizer: --model_name_or_path "
            f"{folder} and another --output_dir instead of --resume_from_checkpoint."
        )
    others = [str(path) for path in _newest_first(folder.parent) if path != folder and _is_complete(path)]
    remedy = f"Name {others[0]}, which is complete" if others else "Name another checkpoint-* folder"
    return f"{folder} can't be resumed from: {error}. {remedy}, or leave --resume_from_checkpoint out to start from scratch."


def _is_complete(folder: Path) -> bool:
    with contextlib.suppress(IncompleteCheckpointError, OSError):
        inspect_checkpoint(folder)
        return True
    return False


def _newest(asked: str, output_dir: Path, ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    """Return the newest complete checkpoint; log a warning for each newer one that is passed over."""
    problems: list[tuple[Path, IncompleteCheckpointError]] = []
    for folder in _newest_first(output_dir):
        try:
            checkpoint = inspect_checkpoint(folder, ds_config)
        except IncompleteCheckpointError as error:
            problems.append((folder, error))
            continue
        for path, error in problems:
            logger.warning("%s is passed over, since it is not complete: %s", path, error.with_code)
        return checkpoint
    if not problems:
        raise ArgumentError(
            f"{asked}: no checkpoint-* folder in {output_dir}. Leave the option out to start from scratch.",
            code="resume.no_checkpoint",
        )
    folder, error = problems[0]
    if error.code == WEIGHTS_ALONE or len(problems) == 1:
        raise ArgumentError(f"{asked}: {_unusable(folder, error)}", code=error.code)
    lines = "\n".join(f"  {path.name}: {error.with_code}" for path, error in problems)
    raise ArgumentError(
        f"{asked}: no checkpoint in {output_dir} is complete. Leave the option out to start from scratch.\n{lines}",
        code="resume.no_whole_checkpoint",
        listed=[error.code for _, error in problems],
    )


def _newest_first(folder: Path) -> list[Path]:
    """List the `checkpoint-N` folders, the highest number first."""
    numbered = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]
