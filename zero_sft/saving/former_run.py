"""Refuse an output folder that holds another run, unless this run resumes from it or may overwrite it.

Everything here runs on rank 0 and does not communicate.
"""

import logging
import re
import shutil
from pathlib import Path

from zero_sft.errors import ArgumentError
from zero_sft.saving.placing import WEIGHTS

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LOGS = ("logs/history.json", "logs/arguments.json")


def require_no_former_run(output_dir: str | Path, checkpoint: Path | None, overwrite: bool, model: str = "") -> bool:
    """Refuse to lose another run's results silently; return whether a former run is to be overwritten. Rank 0.

    Args:
        checkpoint: the checkpoint from which this run resumes.
        overwrite: the value of `--overwrite_output_dir`.
        model: the value of `--model_name_or_path`.

    Raises:
        ArgumentError: the folder holds a model, checkpoints or logs, and this run neither resumes from them nor overwrites.
    """
    output = Path(output_dir).expanduser()
    names = former_run(output)
    resumes = checkpoint is not None and checkpoint.resolve().parent == output.resolve()
    if not names or resumes:
        return False
    if not overwrite:
        raise ArgumentError(
            f"--output_dir {output_dir} holds another run ({names[0]}{', ...' * (len(names) > 1)}). Name another folder, "
            "resume from its last checkpoint with --resume_from_checkpoint True, or give --overwrite_output_dir True, which "
            "removes its checkpoints when the training begins and replaces its model at the end.",
            code="export.holds_another_run",
        )
    for folder in checkpoints_in(output):
        if model and Path(model).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ArgumentError(
                f"--overwrite_output_dir True would remove {folder}, which --model_name_or_path names. Name another "
                "--output_dir.",
                code="export.would_remove_the_model",
            )
    return True


def former_run(output: Path) -> list[str]:
    """List the names in a folder that a run has written: weights, checkpoints, logs. Other files are ignored."""
    if not output.is_dir():
        return []
    names = [path.name for path in output.iterdir()]
    weights = sorted(name for name in names if WEIGHTS.fullmatch(name))
    checkpoints = [path.name for path in checkpoints_in(output)]
    return [*weights, *checkpoints, *(name for name in _LOGS if (output / name).is_file())]


def checkpoints_in(output: Path) -> list[Path]:
    """List the `checkpoint-N` folders in an output folder."""
    paths = output.glob("checkpoint-*") if output.is_dir() else ()
    return sorted(path for path in paths if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


def remove_checkpoints(output: Path) -> None:
    """Remove a former run's checkpoints, so that no later run resumes from them. Rank 0."""
    for path in checkpoints_in(output):
        logger.info("removing %s of the former run", path)
        shutil.rmtree(path)
