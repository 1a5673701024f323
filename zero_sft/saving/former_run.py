"""Refuse an output folder that holds another run, unless this run resumes from it or may overwrite it.

Everything here runs on rank 0 and does not communicate.
"""

import logging
import shutil
from pathlib import Path

from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.errors import ArgumentError
from zero_sft.saving.placing import WEIGHTS

logger = logging.getLogger(__name__)

LOGS = "logs"
"""The folder inside the output folder for a run's logs and metrics."""
_LOG_FILES = ("history.json", "arguments.json")


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
    checkpoints = checkpoints_in(output)
    names = sorted(path.name for path in output.glob("*") if WEIGHTS.fullmatch(path.name))
    names += [path.name for path in checkpoints] + [f"{LOGS}/{name}" for name in _LOG_FILES if (output / LOGS / name).is_file()]
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
    for folder in checkpoints:
        if model and Path(model).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ArgumentError(
                f"--overwrite_output_dir True would remove {folder}, which --model_name_or_path names. Name another "
                "--output_dir.",
                code="export.would_remove_the_model",
            )
    return True


def remove_checkpoints(output: Path) -> None:
    """Remove a former run's checkpoints, so that no later run resumes from them. Rank 0."""
    for path in checkpoints_in(output):
        logger.info("removing %s of the former run", path)
        shutil.rmtree(path)
