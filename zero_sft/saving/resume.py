"""Find the checkpoint from which a run resumes, and check all of its files before the weights are read."""

import contextlib
import logging
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.manifest import MANIFEST_FILE
from zero_sft.cluster.control_group import LONG_WAIT
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.saving.checkpoint_folders import newest_first, restore_former
from zero_sft.saving.deepspeed_pickles import require_known_classes
from zero_sft.saving.placing import WEIGHTS
from zero_sft.saving.trainer_checkpoint import (
    SAME_HOSTS,
    WEIGHTS_ALONE,
    IncompleteCheckpointError,
    TrainerCheckpoint,
    has_states,
    inspect_checkpoint,
    require_intact,
    require_own_share_intact,
)

logger = logging.getLogger(__name__)

_PASSED_OVER = frozenset({"resume.file_damaged", "resume.on_another_host", "resume.differs_between_hosts"})
"""Error codes of checkpoints in place of which an earlier one is looked for, unless the user names them."""

AUTO = "auto"
"""Value of `--resume_from_checkpoint`: as True, and a run without a complete checkpoint starts from its beginning."""


def agree_on_checkpoint(
    wanted: str | bool | None,
    output_dir: str | Path,
    world: World,
    ds_config: Mapping[str, Any],
    dtype: str | None = None,
    *,
    on_each_node: bool = False,
) -> TrainerCheckpoint | None:
    """Return the checkpoint to resume from, the same on every rank; None for a new run. Every rank; communicates.

    Rank 0 checks that all files are there; each rank reads a share of them, or the files that it alone will load, and compares
    their checksums. A checkpoint that fails is passed over, unless it is the one that the user names.

    Args:
        on_each_node: each node may have its own output folder.

    Raises:
        ArgumentError: as in `find_checkpoint`, or a rank does not see its files, or one was changed.
    """
    if wanted is None or wanted is False:
        return None
    if on_each_node:
        _look_on_each_node(Path(output_dir).expanduser(), world, searches=_searches(wanted))
    damaged: dict[Path, ArgumentError] = {}
    while True:
        try:
            checkpoint = _find_everywhere(wanted, output_dir, world, ds_config, dtype, list(damaged))
        except ArgumentError:
            if damaged:  # and no other one
                raise next(iter(damaged.values())) from None
            raise
        if checkpoint is None:
            return None
        try:
            _require_intact_everywhere(wanted, checkpoint, world)
        except ArgumentError as error:  # the same on every rank
            if error.code not in _PASSED_OVER or not _searches(wanted):
                raise
            if world.is_main:
                logger.warning("%s is passed over: %s", checkpoint.folder, error.with_code)
            damaged[checkpoint.folder] = error
        else:
            return checkpoint


def _look_on_each_node(output: Path, world: World, *, searches: bool) -> None:
    """Restore what a killed run was replacing, in each node's folder. Every rank; communicates.

    Raises:
        ArgumentError: a checkpoint is looked for, and other hosts than that of rank 0 have some.
    """
    with collective_stage(world, "looking for checkpoints on each node") as exchange:
        if world.leads_node:
            _restore_former(output)
            exchange.local = [socket.gethostname(), [path.name for path in newest_first(output)]]
    if searches and not exchange.gathered[0][1]:
        for host, names in filter(None, exchange.gathered):
            if names:
                raise ArgumentError(
                    f"{host} has {names[0]} in {output}, and {exchange.gathered[0][0]}, the host of rank 0, has no checkpoint "
                    f"there. {SAME_HOSTS}",
                    code="resume.not_on_first_host",
                )


def _restore_former(output: Path) -> None:
    for path in restore_former(output):
        logger.info("%s is restored: a run was killed while it replaced this checkpoint", path)


def _find_everywhere(
    wanted: str | bool,
    output_dir: str | Path,
    world: World,
    ds_config: Mapping[str, Any],
    dtype: str | None,
    damaged: Sequence[Path],
) -> TrainerCheckpoint | None:
    """Let rank 0 find the checkpoint. Every rank; communicates."""
    with collective_stage(world, "looking at the checkpoint") as exchange:
        if world.is_main:
            _restore_former(Path(output_dir).expanduser())
            checkpoint = find_checkpoint(wanted, output_dir, world.world_size, ds_config, dtype, damaged=damaged)
            exchange.local = checkpoint and asdict(checkpoint) | {"folder": str(checkpoint.folder)}
    found = exchange.gathered[0]
    if found is None:
        return None
    return TrainerCheckpoint(**found | {"folder": Path(found["folder"])})


def _require_intact_everywhere(wanted: str | bool, checkpoint: TrainerCheckpoint, world: World) -> None:
    """Check that each rank sees its files, and that no file was changed. Every rank; communicates."""
    stage = collective_stage(world, "looking for this rank's files of the checkpoint", LONG_WAIT)
    with stage as exchange:  # it reads all of them
        for path in checkpoint.own_files(world.rank):
            if not path.is_file() and checkpoint.on_each_node:
                raise ArgumentError(
                    f"{socket.gethostname()} has no {path}, which the host of rank 0 has (--save_on_each_node). " + SAME_HOSTS,
                    code="resume.on_another_host",
                )
            if not path.is_file():
                raise ArgumentError(
                    f"--resume_from_checkpoint {wanted}: rank {world.rank} does not see {path}, which rank 0 sees. Put the "
                    "checkpoint on a file system that all ranks share.",
                    code="resume.folder_not_shared",
                )
            if not checkpoint.sharded:
                require_intact(path)
                require_known_classes(path)  # DeepSpeed and the Trainer unpickle everything in it
        if checkpoint.sharded:
            require_own_share_intact(checkpoint.folder, world)
            exchange.local = zlib.crc32((checkpoint.folder / MANIFEST_FILE).read_bytes())
    if len(set(exchange.gathered)) > 1:
        raise ArgumentError(
            f"{checkpoint.folder} is not the same checkpoint on all hosts: their {MANIFEST_FILE} differ. Name another one with "
            "--resume_from_checkpoint.",
            code="resume.differs_between_hosts",
        )


def find_checkpoint(
    wanted: str | bool,
    output_dir: str | Path,
    world_size: int,
    ds_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    *,
    damaged: Sequence[Path] = (),
) -> TrainerCheckpoint | None:
    """Return the checkpoint in the folder `wanted`, or for True the newest complete one in `output_dir`. Rank 0.

    For "auto", it is the newest as well, and None if there is none.

    Args:
        ds_config: this run's DeepSpeed config; `inspect_checkpoint` explains its use.
        dtype: in which this run's engine trains, such as "bfloat16"; None if that is not known.
        damaged: checkpoints that are passed over.

    Raises:
        ArgumentError: there is no checkpoint, or it is incomplete, or of another number of ranks or another precision.
    """
    if wanted == AUTO and not _has_complete(Path(output_dir).expanduser(), ds_config, damaged):
        logger.info("%s has no complete checkpoint: the run starts from its beginning", output_dir)
        return None
    checkpoint = _first_complete(wanted, _candidates(wanted, output_dir, damaged), ds_config)
    if checkpoint.world_size != world_size and not checkpoint.sharded:
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: {checkpoint.folder} was saved with {checkpoint.world_size} ranks, and this "
            f"run has {world_size}. DeepSpeed's checkpoints are for one number of ranks, those of --checkpoint_format sharded "
            f"for any. Start {checkpoint.world_size} ranks, or continue from the weights with a new optimizer: `python -m "
            f"zero_sft.export {checkpoint.folder} {checkpoint.folder}-model`, then give --model_name_or_path "
            f"{checkpoint.folder}-model and another --output_dir instead of --resume_from_checkpoint.",
            code="resume.other_world_size",
        )
    is_other = dtype != checkpoint.dtype if checkpoint.sharded else (dtype == "bfloat16") is not checkpoint.bf16
    if dtype is not None and is_other:
        earlier = checkpoint.dtype if checkpoint.sharded or checkpoint.bf16 else "float32 or float16"
        remedy = "--fp16 True" if checkpoint.dtype == "float16" else f"--bf16 {checkpoint.bf16}"
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: {checkpoint.folder} was trained in {earlier}, and this run trains in {dtype}. "
            f"Give {remedy}.",
            code="resume.other_dtype",
        )
    return checkpoint


def _searches(wanted: str | bool) -> bool:
    """Return whether the checkpoint is to be found in the output folder, and not named."""
    return wanted is True or wanted == AUTO


def _candidates(wanted: str | bool, output_dir: str | Path, damaged: Sequence[Path]) -> Sequence[Path]:
    """Return the folder `wanted`, or for True and "auto" all checkpoints in `output_dir`, the newest first."""
    searches = _searches(wanted)
    folder = Path(output_dir if searches else str(wanted)).expanduser()
    if not searches and not folder.is_dir():
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: no folder {folder}. Leave the option out to start from scratch.",
            code="resume.no_such_folder",
        )
    checkpoints = [path for path in newest_first(folder) if path not in damaged]
    if not searches:
        if checkpoints and not has_states(folder):
            raise ArgumentError(
                f"--resume_from_checkpoint {wanted}: {folder} is a run's folder, which holds checkpoints. Name one of "
                f"them, such as {checkpoints[0]}.",
                code="resume.folder_of_checkpoints",
            )
        return [folder]
    if not checkpoints:
        finished = folder.is_dir() and any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
        remedy = (
            "The folder holds a finished model. To train again, name another --output_dir, or give --overwrite_output_dir True"
            if finished
            else "Leave the option out to start from scratch"
        )
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: no checkpoint-* folder in {folder}. {remedy}.", code="resume.no_checkpoint"
        )
    return checkpoints


def _first_complete(wanted: str | bool, folders: Sequence[Path], ds_config: Mapping[str, Any] | None) -> TrainerCheckpoint:
    """Return the first complete checkpoint; log a warning for each one that is passed over."""
    problems: list[tuple[Path, IncompleteCheckpointError]] = []
    for folder in folders:
        try:
            checkpoint = inspect_checkpoint(folder, ds_config)
        except IncompleteCheckpointError as error:
            problems.append((folder, error))
            continue
        for path, error in problems:
            _warn_passed_over(path, error)
        return checkpoint
    folder, error = problems[0]
    if error.code == WEIGHTS_ALONE or len(problems) == 1:
        raise ArgumentError(f"--resume_from_checkpoint {wanted}: {_unusable(folder, error)}", code=error.code) from error
    lines = "\n".join(f"  {path.name}: {error.with_code}" for path, error in problems)
    raise ArgumentError(
        f"--resume_from_checkpoint {wanted}: no checkpoint in {folder.parent} is complete. Leave the option out to start from "
        f"scratch.\n{lines}",
        code="resume.no_whole_checkpoint",
        listed=[error.code for _, error in problems],
    )


def _has_complete(output: Path, ds_config: Mapping[str, Any] | None, damaged: Sequence[Path]) -> bool:
    """Return whether one of the checkpoints is complete; if not, log the reason for each."""
    problems = []
    for folder in newest_first(output):
        if folder in damaged:
            continue
        try:
            inspect_checkpoint(folder, ds_config)
        except IncompleteCheckpointError as error:
            problems.append((folder, error))
        else:
            return True
    for folder, error in problems:
        _warn_passed_over(folder, error)
    return False


def _warn_passed_over(folder: Path, error: IncompleteCheckpointError) -> None:
    logger.warning("%s is passed over, since it is not complete: %s", folder, error.with_code)


def _unusable(folder: Path, error: IncompleteCheckpointError) -> str:
    if error.code == WEIGHTS_ALONE:
        return (
            f"{folder} can't be resumed from: {error}. Continue from these weights with a new optimizer: --model_name_or_path "
            f"{folder} and another --output_dir instead of --resume_from_checkpoint."
        )
    other = next((path for path in newest_first(folder.parent) if path != folder and _is_complete(path)), None)
    remedy = f"Name {other}, which is complete" if other else "Name another checkpoint-* folder"
    return f"{folder} can't be resumed from: {error}. {remedy}, or leave --resume_from_checkpoint out to start from scratch."


def _is_complete(folder: Path) -> bool:
    with contextlib.suppress(IncompleteCheckpointError, OSError):
        inspect_checkpoint(folder)
        return True
    return False
