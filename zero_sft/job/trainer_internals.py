"""The internals of transformers' Trainer and TRL's `SFTTrainer` that the job uses, listed in this one place.

The job's trainer overrides methods that the libraries must call by these names, and corrects a count that TRL keeps in private
attributes. `check` and `check_trainer` verify that the installed releases still have them.
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
"""Methods of the trainers that the job's trainer overrides."""

_SET = ("_metrics", "_total_train_tokens", "aux_loss_enabled")
"""Attributes that the constructor of TRL's trainer sets."""


def check() -> None:
    """Check that the trainers still have the methods that the job overrides.

    Raises:
        UnsupportedVersionError: a method is missing; the message names the first.
    """
    _require(SFTTrainer, OVERRIDDEN)


def check_trainer(trainer: SFTTrainer) -> None:
    """Check that a trainer instance still has the attributes that the job uses.

    Raises:
        UnsupportedVersionError: an attribute is missing; the message names the first.
    """
    _require(trainer, _SET)


def computed_tokens(trainer: Any) -> int:
    """Return the number of tokens that TRL has counted on all ranks since the process started."""
    return trainer._total_train_tokens


def set_computed_tokens(trainer: Any, tokens: int) -> None:
    """Set TRL's count of all computed tokens."""
    trainer._total_train_tokens = tokens


def set_logged_tokens(trainer: Any, tokens: int) -> None:
    """Set the token count that TRL logs next."""
    trainer._metrics["train"]["num_tokens"] = [tokens]


def _require(trainer: object, names: tuple[str, ...]) -> None:
    for name in names:
        if not hasattr(trainer, name):
            raise _moved(f"SFTTrainer.{name}")


def _moved(name: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"transformers {transformers.__version__} or TRL {trl.__version__} has no {name}, which training, saving and "
        f"resuming need; this version is tested with transformers {', '.join(TESTED)}. Install a tested release.",
        code="version.trainer_moved",
    )
