"""Every internal of the Trainer and of TRL's `SFTTrainer` that the job uses, named in this one place.

The job's trainer overrides methods that the libraries must still call by these names, and corrects a count that TRL keeps in
private attributes. `check` finds out whether the installed releases have them all.
"""

from typing import Any

import transformers
import trl
from trl import SFTTrainer

from zero_sft.errors import UnsupportedVersionError
from zero_sft.transformers_internals import TESTED

OVERRIDDEN = ("_run_epoch", "_save_checkpoint", "create_scheduler", "_load_optimizer_and_scheduler", "save_model",
              "_get_train_sampler", "get_batch_samples", "compute_loss", "evaluation_loop", "get_eval_dataloader",
              "prediction_step", "create_model_card")  # fmt: skip
"""Methods of the trainers that the job's own replaces or extends."""

_SET = ("_metrics", "_total_train_tokens", "aux_loss_enabled")
"""Attributes that TRL's trainer sets when it is built."""


def check() -> None:
    """Look up the methods that the job overrides.

    Raises:
        UnsupportedVersionError: naming the first one that is gone.
    """
    for name in OVERRIDDEN:
        if not hasattr(SFTTrainer, name):
            raise _moved(f"Trainer.{name}")


def check_trainer(trainer: SFTTrainer) -> None:
    """Look up the attributes of a trainer that was built.

    Raises:
        UnsupportedVersionError: naming the first one that is gone.
    """
    for name in _SET:
        if not hasattr(trainer, name):
            raise _moved(f"SFTTrainer.{name}")


def computed_tokens(trainer: Any) -> int:
    """The tokens that TRL has counted on all ranks, since the process began."""
    return trainer._total_train_tokens


def set_computed_tokens(trainer: Any, tokens: int) -> None:
    """Set TRL's count of tokens."""
    trainer._total_train_tokens = tokens


def set_logged_tokens(trainer: Any, tokens: int) -> None:
    """Set the count of tokens that TRL logs next."""
    trainer._metrics["train"]["num_tokens"] = [tokens]


def _moved(what: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"transformers {transformers.__version__} or TRL {trl.__version__} has moved {what}, which training, saving and "
        f"resuming need; tested with transformers {', '.join(TESTED)}. Install a tested release.",
        code="version.trainer_moved",
    )
