"""An output folder that another run has written to: refused, unless that run is resumed or to be overwritten.

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
    """Check that nothing of another run is lost silently; true if a former run is to be overwritten. Rank 0.

    Args:
        checkpoint: the one that this run resumes from.
        overwrite: `--overwrite_output_dir`.
        model: `--model_name_or_path`.

    Raises:
        ArgumentError: the folder holds a model, checkpoints or logs, and neither allows for them.
    """
    output = Path(output_dir).expanduser()
    found = former_run(output)
    resumes = checkpoint is not None and checkpoint.resolve().parent == output.resolve()
    if not found or resumes:
        return False
    if not overwrite:
        raise ArgumentError(
            f"--output_dir {output_dir} holds another run ({found[0]}{', ...' * (len(found) > 1)}). Name another folder, go on "
            "from its last checkpoint with --resume_from_checkpoint True, or give --overwrite_output_dir True, which removes "
            "its checkpoints when the training begins and replaces its model at the end.",
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
    """The names in a folder that are a run's: weights, checkpoints, logs. Other files are nobody's business."""
    if not output.is_dir():
        return []
    names = [path.name for path in output.iterdir()]
    weights = sorted(name for name in names if WEIGHTS.fullmatch(name))
    checkpoints = [path.name for path in checkpoints_in(output)]
    return [*weights, *checkpoints, *(name for name in _LOGS if (output / name).is_file())]


def checkpoints_in(output: Path) -> list[Path]:
    """The `checkpoint-N` folders in an output folder."""
    found = output.glob("checkpoint-*") if output.is_dir() else ()
    return sorted(path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


def remove_checkpoints(output: Path) -> None:
    """Remove a former run's checkpoints, so that none of them is resumed from in place of this run's."""
    for path in checkpoints_in(output):
        logger.info("removing %s of the former run", path)
        shutil.rmtree(path)
