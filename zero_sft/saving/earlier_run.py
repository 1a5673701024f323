"""Refuse an output folder that holds an earlier run, unless this run resumes from it or may overwrite it.

Everything here runs on rank 0 and does not communicate.
"""

import logging
import shutil
from pathlib import Path

from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.errors import ArgumentError
from zero_sft.saving.checkpoint_folders import leftovers
from zero_sft.saving.placing import WEIGHTS

logger = logging.getLogger(__name__)

LOGS = "logs"
"""The folder inside the output folder for a run's logs and metrics."""
_LOG_FILES = ("history.json", "arguments.json")


def overwrites_earlier_run(
    output_dir: str | Path, checkpoint: Path | None, overwrite: bool, model: str = "", *, resumes_if_possible: bool = False
) -> bool:
    """Return whether this run overwrites an earlier run in its output folder, which the user must have allowed. Rank 0.

    Args:
        checkpoint: the checkpoint from which this run resumes.
        overwrite: the value of `--overwrite_output_dir`.
        model: the value of `--model_name_or_path`.
        resumes_if_possible: this run would resume from a complete checkpoint in the folder. Without `checkpoint`, those that
            are there are of no use, and stay.

    Raises:
        ArgumentError: the folder holds a model, checkpoints or logs, and this run neither resumes from them nor overwrites.
    """
    output = Path(output_dir).expanduser()
    checkpoints = [] if resumes_if_possible else checkpoints_in(output)
    names = sorted(path.name for path in output.glob("*") if WEIGHTS.fullmatch(path.name))
    names += [path.name for path in checkpoints] + [f"{LOGS}/{name}" for name in _LOG_FILES if (output / LOGS / name).is_file()]
    if not names or is_in(checkpoint, output):
        return False
    if not overwrite:
        raise ArgumentError(
            f"--output_dir {output_dir} holds an earlier run ({names[0]}{', ...' * (len(names) > 1)}). Name another folder, "
            + "resume from its last checkpoint with --resume_from_checkpoint True, " * bool(checkpoints)
            + "or give --overwrite_output_dir True, which removes its checkpoints when the training begins and replaces its "
            "model at the end.",
            code="export.holds_another_run",
        )
    for folder in checkpoints:
        if model and Path(model).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ArgumentError(
                f"--overwrite_output_dir True would remove {folder}, which --model_name_or_path names. Name another "
                "--output_dir.",
                code="export.would_remove_the_model",
            )
    return True


def is_in(checkpoint: Path | None, output: Path) -> bool:
    """Return whether a run resumes from a checkpoint in its output folder: it may be a link, or be named by one."""
    return checkpoint is not None and output.resolve() in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def remove_checkpoints(output: Path) -> None:
    """Remove an earlier run's checkpoints, so that no later run resumes from them. One rank of each file system."""
    for path in checkpoints_in(output):
        logger.info("removing %s of the earlier run", path)
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def remove_leftovers(output: Path) -> None:
    """Remove what a killed run has left of a checkpoint that it was writing. One rank of each file system."""
    for path in leftovers(output):
        logger.info("removing %s, which a run that was killed has not finished", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
