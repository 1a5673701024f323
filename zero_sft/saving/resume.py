"""Find the checkpoint from which a run resumes, and check all of its files before the weights are read."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.saving.trainer_checkpoint import WEIGHTS_ALONE, IncompleteCheckpointError, TrainerCheckpoint, inspect_checkpoint

logger = logging.getLogger(__name__)


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
            exchange.local = asdict(checkpoint) | {"folder": str(checkpoint.folder)}
    found = exchange.gathered[0]
    checkpoint = TrainerCheckpoint(**found | {"folder": Path(found["folder"])})
    with collective_stage(world, "looking at the checkpoint"):
        for path in checkpoint.files_of(world.rank):
            if not path.is_file():
                raise ArgumentError(
                    f"--resume_from_checkpoint {wanted}: rank {world.rank} does not see {path}, which rank 0 sees. Put the "
                    "checkpoint on a file system that all ranks share.",
                    code="resume.folder_not_shared",
                )
    return checkpoint


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
    checkpoint = _first_complete(asked, _candidates(asked, wanted, output_dir), ds_config)
    if checkpoint.world_size != world_size:
        raise ArgumentError(
            f"{asked}: {checkpoint.folder} was saved with {checkpoint.world_size} ranks, and this run has {world_size}. "
            f"DeepSpeed's optimizer state can't be resharded. Start {checkpoint.world_size} ranks, or continue from the "
            f"weights with a new optimizer: `python -m deepspeed.utils.zero_to_fp32 {checkpoint.folder} {checkpoint.folder}` "
            f"adds them to the folder, then give --model_name_or_path {checkpoint.folder} and another --output_dir instead of "
            "--resume_from_checkpoint.",
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


def _candidates(asked: str, wanted: str | bool, output_dir: str | Path) -> Sequence[Path]:
    """Return the folder `wanted`, or for True all checkpoints in `output_dir`, the newest first."""
    folder = Path(output_dir if wanted is True else str(wanted)).expanduser()
    if wanted is not True and not folder.is_dir():
        raise ArgumentError(
            f"{asked}: no folder {folder}. Leave the option out to start from scratch.", code="resume.no_such_folder"
        )
    folders = checkpoints_in(folder) if wanted is True else [folder]
    if not folders:
        raise ArgumentError(
            f"{asked}: no checkpoint-* folder in {folder}. Leave the option out to start from scratch.",
            code="resume.no_checkpoint",
        )
    return folders


def _first_complete(asked: str, folders: Sequence[Path], ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    """Return the first complete checkpoint; log a warning for each one that is passed over."""
    problems: list[tuple[Path, IncompleteCheckpointError]] = []
    for folder in folders:
        try:
            checkpoint = inspect_checkpoint(folder, ds_config)
        except IncompleteCheckpointError as error:
            problems.append((folder, error))
            continue
        for path, error in problems:
            logger.warning("%s is passed over, since it is not complete: %s", path, error.with_code)
        return checkpoint
    folder, error = problems[0]
    if error.code == WEIGHTS_ALONE or len(problems) == 1:
        raise ArgumentError(f"{asked}: {_unusable(folder, error)}", code=error.code) from error
    lines = "\n".join(f"  {path.name}: {error.with_code}" for path, error in problems)
    raise ArgumentError(
        f"{asked}: no checkpoint in {folder.parent} is complete. Leave the option out to start from scratch.\n{lines}",
        code="resume.no_whole_checkpoint",
        listed=[error.code for _, error in problems],
    )


def _unusable(folder: Path, error: IncompleteCheckpointError) -> str:
    if error.code == WEIGHTS_ALONE:
        return (
            f"{folder} can't be resumed from: {error}. Continue from these weights with a new optimizer: --model_name_or_path "
            f"{folder} and another --output_dir instead of --resume_from_checkpoint."
        )
    other = next((path for path in checkpoints_in(folder.parent) if path != folder and _is_complete(path)), None)
    remedy = f"Name {other}, which is complete" if other else "Name another checkpoint-* folder"
    return f"{folder} can't be resumed from: {error}. {remedy}, or leave --resume_from_checkpoint out to start from scratch."


def _is_complete(folder: Path) -> bool:
    with contextlib.suppress(IncompleteCheckpointError, OSError):
        inspect_checkpoint(folder)
        return True
    return False
