"""The internals of transformers' Trainer and TRL's `SFTTrainer` that the job uses, listed in this one place.

The job's trainer overrides methods that the libraries must call by these names, and corrects a count that TRL keeps in private
attributes. `require` verifies that the installed releases still have them.
"""

from dataclasses import dataclass
from typing import Any

import transformers
import trl
from accelerate.data_loader import prepare_data_loader

from zero_sft.errors import UnsupportedVersionError
from zero_sft.job.sequence_parallel import DataRank
from zero_sft.transformers_internals import TESTED

OVERRIDDEN = (
    "_run_epoch", "_save_checkpoint", "_init_training_state", "_prepare_for_training", "_load_rng_state",
    "_load_best_model", "_finalize_training", "_maybe_log_save_evaluate",
    "store_flos", "create_optimizer", "create_scheduler", "_load_optimizer_and_scheduler",
    "save_model", "_get_train_sampler", "training_step", "get_batch_samples",
    "compute_loss", "log", "evaluate", "evaluation_loop", "get_eval_dataloader", "prediction_step", "create_model_card",
    "floating_point_ops",
)  # fmt: skip
"""Methods of the trainers that the job's trainer overrides."""

SET = ("_metrics", "_total_train_tokens", "aux_loss_enabled")
"""Attributes that the constructor of TRL's trainer sets."""

SET_BY_TRAIN = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
"""Attributes that the Trainer sets when a training begins."""


def require(trainer: object, names: tuple[str, ...]) -> None:
    """Raise `UnsupportedVersionError` unless TRL's trainer, its class or an instance, has all the names."""
    for name in names:
        if not hasattr(trainer, name):
            raise UnsupportedVersionError(
                f"transformers {transformers.__version__} or TRL {trl.__version__} has no SFTTrainer.{name}, which training, "
                f"saving and resuming need; this version is tested with transformers {', '.join(TESTED)}. Install a tested "
                "release.",
                code="version.trainer_moved",
            )


def share_batches(accelerator: Any, place: DataRank) -> None:
    """Let all ranks of a group read the same batches: accelerate gives each process others."""

    def prepare(loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=place.ranks,
            process_index=place.rank,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=accelerator.rng_types.copy(),
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    accelerator.prepare_data_loader = prepare


def computed_tokens(trainer: Any) -> int:
    """Return the number of tokens that TRL has counted on all ranks since the process started."""
    return trainer._total_train_tokens


def set_computed_tokens(trainer: Any, tokens: int) -> None:
    """Set TRL's count of all computed tokens."""
    trainer._total_train_tokens = tokens


def set_logged_tokens(trainer: Any, tokens: int) -> None:
    """Set the token count that TRL logs next."""
    trainer._metrics["train"]["num_tokens"] = [tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSum:
    """The sum of the losses of all steps until the last one that was logged."""

    total: float
    last_logged: int


def loss_sum(trainer: Any) -> LossSum:
    """Return the Trainer's sum of losses."""
    return LossSum(total=trainer._total_loss_scalar, last_logged=trainer._globalstep_last_logged)


def leave_out_logged_loss(trainer: Any, before: LossSum, first_step: int) -> None:
    """Leave the losses that were logged last out of the sum, as if they had been the mean. NaN would stay in it.

    Args:
        before: the sum before they were logged.
        first_step: the step from which the sum was begun.
    """
    trainer._tr_loss.zero_()
    steps = before.last_logged - first_step
    grown = (trainer._globalstep_last_logged - first_step) / steps if steps > 0 else 1.0
    trainer._total_loss_scalar = before.total * grown
