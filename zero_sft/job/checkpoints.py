"""Save a run's checkpoints and export its model, with the same config and tokenizer files in both.

No rank gathers the whole model: each writes its own shards. Importing this module imports TRL.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from zero_sft.arguments.durations import parse_duration
from zero_sft.checkpoint.folder_kind import is_folder
from zero_sft.checkpoint.run_state import read_trainer_state
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import EndedEarlyError, ExportError, Scope
from zero_sft.job import sharded_checkpoints, trainer_internals
from zero_sft.job.ending_early import EndEarly, EvaluationEndedEarly
from zero_sft.job.sharded_checkpoints import ShardedCheckpoints
from zero_sft.job.trained_part import set_rates
from zero_sft.rope import text_config
from zero_sft.saving.export import save_form, save_pretrained
from zero_sft.saving.folder import explain_write_errors, require_writable
from zero_sft.saving.forms import MergedModel
from zero_sft.saving.resume_step import step_of_same_sample
from zero_sft.saving.run_record import RunRecord, read_record, write_record
from zero_sft.saving.settings import write_settings
from zero_sft.zero.internals import set_optimizer_defaults

logger = logging.getLogger("zero_sft.train")


ADAPTER_FOLDER = "adapter"
"""The folder in the output folder for the adapter, if a merged model is written next to it."""

_ROUTER_KEYS = ("output_router_logits", "router_aux_loss_coef")
"""Keys of a mixture-of-experts config that TRL overwrites for the training."""


class SavingTrainer(SFTTrainer):
    """An `SFTTrainer` that writes this project's checkpoints and export. A finished run that is resumed trains no step.

    Args:
        saved_tokenizer: the tokenizer that checkpoints and the export hold, with the chat template of the run.
        record: describes the run in every checkpoint that holds the optimizer's state.
    """

    def __init__(self, *, model: Any, saved_tokenizer: Any, record: RunRecord, world: World, **kwargs: Any) -> None:
        trainer_internals.require(SFTTrainer, trainer_internals.OVERRIDDEN)
        self._saved_tokenizer, self._record, self._world = saved_tokenizer, record, world
        self._step_at_start = 0
        self._saved_here: int | None = None  # the last step of which transformers has saved a checkpoint
        self._step_now: Callable[[int], int] = lambda step: step  # of a checkpoint whose steps have other samples
        config = text_config(model.config)
        self._router_values = {name: getattr(config, name) for name in _ROUTER_KEYS if hasattr(config, name)}
        super().__init__(model=model, **kwargs)
        trainer_internals.require(self, trainer_internals.SET)
        self.checkpoints = ShardedCheckpoints(self, saved_tokenizer, record, world)
        self.add_callback(_PollCheckpoints(self.checkpoints))
        limit = self.args.max_time  # type: ignore[attr-defined]
        self._ending = EndEarly(
            Path(str(self.args.output_dir)),
            world,
            max_seconds=None if limit is None else parse_duration("max_time", limit),
            save_seconds=lambda: self.checkpoints.last_save_seconds,
        )
        self.add_callback(self._ending)

    @contextlib.contextmanager
    def _without_trl_changes(self) -> Iterator[None]:
        """Undo TRL's changes in the model's config while files are written."""
        model: Any = self.model
        config = text_config(model.config)
        training_values = {name: getattr(config, name) for name in self._router_values}
        config.update(self._router_values)
        try:
            yield
        finally:
            config.update(training_values)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer, with the rates of `--learning_rates`."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(model)
        rates = self.args.learning_rates  # type: ignore[attr-defined]
        if is_new and rates:
            trained: Any = self.model if model is None else model
            set_rates(optimizer, trained.named_parameters(), rates)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the Trainer's scheduler. Some schedules read the optimizer's `defaults`, which DeepSpeed's optimizer lacks."""
        set_optimizer_defaults(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as the Trainer does, then set the learning rates: the checkpoint's base rates times this run's schedule.

        The optimizer's state holds the rates of the earlier run's schedule: a run of 4 steps that is extended to 6 would take
        its fifth step with the last rate of that schedule, 0.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._set_rates()

    def _set_rates(self) -> None:
        """Set the learning rates of the next step from this run's schedule."""
        schedule: Any = self.lr_scheduler
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        step = schedule.last_epoch
        rates = [base_lr * factor(step) for base_lr, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def train_to_the_end(self, checkpoint: Path | None) -> Exception | None:
        """Train, and return an error from after the last step (a save, a report), so that the model is still exported.

        Every rank; communicates. Earlier errors are raised.
        """
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except EvaluationEndedEarly:  # before the first step
            return None
        except Exception as error:
            if not 0 < self.state.max_steps <= self.state.global_step:
                if getattr(error, "scope", None) is Scope.ALL_RANKS:
                    self._wait_after_an_error()
                raise
            logger.warning("after the last step: %s: %s. The model is written first.", type(error).__name__, error)
            self._wait_after_an_error()  # as `_finalize_training` does on the ranks without an error
            return error
        return None

    def require_last_step(self) -> None:
        """Raise if the run has ended before its last step. Any rank.

        Raises:
            EndedEarlyError: on every rank; the run can go on.
            ExportError: on every rank; there is no checkpoint of the step after which it ended.
        """
        cause, step, last = self._ending.cause, self.state.global_step, self.state.max_steps
        if not cause:
            return
        where = f"the run has ended after step {step} of {last}, on {cause}"
        if step == self._step_at_start:
            raise EndedEarlyError(
                f"{where}. Nothing was trained since its start.", code="cluster.ended_early", scope=Scope.ALL_RANKS
            )
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_step != step or self.args.save_only_model:
            raise ExportError(
                f"{where}, and {folder} is not a checkpoint from which it can go on. The log above says why.",
                code="save.ended_without_checkpoint",
                scope=Scope.ALL_RANKS,
            )
        raise EndedEarlyError(
            f"{where}. {folder} is complete: the same command with --resume_from_checkpoint auto goes on from it.",
            code="cluster.ended_early",
            scope=Scope.ALL_RANKS,
        )

    @property
    def _saved_step(self) -> int | None:
        """The step of the checkpoint that was saved last, in either format."""
        return self._saved_here if self.checkpoints.last_saved_step is None else self.checkpoints.last_saved_step

    @property
    def newest_checkpoint_step(self) -> int | None:
        """The step of the newest checkpoint: saved by this start, or resumed from; None if there is none."""
        return self._saved_step if self._saved_step is not None else self._step_at_start or None

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the Trainer does; save as well if the evaluation ends early. Every rank; communicates.

        A logged loss that is not finite does not count in the mean, nor in the losses that are logged after it.
        """
        before = trainer_internals.loss_sum(self)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationEndedEarly:
            self.control.should_evaluate, self.control.should_training_stop = False, True
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if not math.isfinite(trainer_internals.loss_sum(self).total):
            trainer_internals.leave_out_logged_loss(self, before, self._step_at_start)

    def _wait_after_an_error(self) -> None:
        """Wait for a checkpoint that is being written. Another error is logged by the saver, and does not replace the first."""
        with contextlib.suppress(ExportError):
            self.checkpoints.wait()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End as the Trainer does, when the last checkpoint is in its place. Every rank; communicates.

        With a limit of one and a best checkpoint, the Trainer would remove the newest one, from which a longer run goes on.
        """
        self.checkpoints.wait()
        limit = self.args.save_total_limit
        if self.args.checkpoint_format == "sharded":  # type: ignore[attr-defined]
            self.args.save_total_limit = None
        if self._ending.cause:
            self.args.load_best_model_at_end = False  # the run goes on later
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def export(self, folder: Path) -> None:
        """Write the model with its config and tokenizer to `folder`, as `save_pretrained` does. Every rank; communicates."""
        model: Any = self.model_wrapped
        with self._without_trl_changes():
            save_pretrained(model, folder, tokenizer=self._saved_tokenizer)

    def export_result(self, folder: Path, *, merge: bool) -> None:
        """Write what the run has trained to `folder`: the model, or its adapter. Every rank; communicates.

        Args:
            merge: write the adapter to a folder in it, and a model with the adapter merged.
        """
        if not merge:
            self.export(folder)
            return
        from zero_sft.adapters.merge import merge as merge_adapter

        self.export(folder / ADAPTER_FOLDER)
        logger.info("merging the adapter")
        merge_adapter(self.model, self._world)
        with self._without_trl_changes():
            save_form(MergedModel(self.model), folder, self._saved_tokenizer, self._world)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's config and tokenizer, and in three cases its weights. Every rank; communicates.

        The Trainer saves DeepSpeed's state next, which holds the weights. They are written here as well if the Trainer does not
        save that state (`--save_only_model True`), if the user calls this method, or if the DeepSpeed config asks for it
        (`gather_16bit_weights_on_model_save`).
        """
        folder = Path(output_dir or str(self.args.output_dir))
        engine: Any = self.model_wrapped
        if self.args.save_only_model or not _internal_call or engine.zero_gather_16bit_weights_on_model_save():
            self.export(folder)
            return
        with collective_stage(self._world, f"writing {folder}"), explain_write_errors(folder):
            if self._world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                model: Any = self.model
                with self._without_trl_changes():
                    write_settings(folder, model, self._saved_tokenizer)
                write_record(folder, self._record)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint. With `--on_save_error continue`, one that can't be written is logged. Every rank; communicates."""
        args: Any = self.args
        if args.checkpoint_format == "sharded" and not args.save_only_model:
            with self._without_trl_changes():
                self.checkpoints.save()
            return
        folder = str(args.output_dir)
        try:
            with collective_stage(self._world, f"checking {folder}"):
                if self._world.is_main:
                    require_writable(folder)
        except ExportError as error:
            if args.on_save_error == "raise":
                raise
            if self._world.is_main:
                logger.warning("no checkpoint is saved at step %d: %s", self.state.global_step, error)
            return
        super()._save_checkpoint(model, trial)
        self._saved_here = self.state.global_step

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, num_train_epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Take over the Trainer's state of a checkpoint, at the step that begins with the same sample. Any rank.

        Returns:
            The number of whole epochs before that step, and of this rank's batches in the next epoch.
        """
        position = super()._init_training_state(max_steps, steps_an_epoch, num_train_epochs, resume_from_checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # else those of the checkpoint
        if resume_from_checkpoint is not None:
            self._find_best(Path(resume_from_checkpoint))
        self._step_at_start = self.state.global_step
        is_sharded = sharded_checkpoints.is_sharded(resume_from_checkpoint)
        then = read_record(Path(str(resume_from_checkpoint))) if is_sharded else None
        if then is None or then.samples_a_step == self._record.samples_a_step:
            return position
        self._step_now = lambda step: step_of_same_sample(step, then, self._record)
        sharded_checkpoints.change_steps(self.state, self._step_now)
        self._step_at_start = self.state.global_step
        epochs, steps = divmod(self.state.global_step, steps_an_epoch)
        return epochs, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _find_best(self, checkpoint: Path) -> None:
        """Find the run's best checkpoint next to the one that is resumed from, if the run's folder was moved. Any rank."""
        recorded = read_trainer_state(checkpoint).get("best_model_checkpoint")
        if recorded is None:
            return
        places = [checkpoint.parent / Path(recorded).name, Path(recorded)]
        self.state.best_model_checkpoint = next((str(place) for place in places if is_folder(place)), None)
        if self.state.best_model_checkpoint is None:
            logger.warning("%s, the best checkpoint, is not there: the best is looked for from here on", places[0])
            self.state.best_metric = self.state.best_global_step = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as the Trainer does, and give the engine the state of a sharded checkpoint. Every rank; communicates."""
        if not sharded_checkpoints.is_sharded(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.checkpoints.newest = Path(str(resume_from_checkpoint))
        sharded_checkpoints.restore(self, Path(str(resume_from_checkpoint)), self._world)
        schedule: Any = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            schedule.last_epoch = self._step_now(schedule.last_epoch)
        self._set_rates()
        sharded_checkpoints.set_deepspeed_rates(self, self._step_now)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set this rank's random generators to their states in a checkpoint."""
        if sharded_checkpoints.is_sharded(checkpoint):
            sharded_checkpoints.restore_generators(Path(str(checkpoint)), self._world)
        else:
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Give the model the weights of the best checkpoint. Every rank; communicates."""
        best = Path(str(self.state.best_model_checkpoint))
        with collective_stage(self._world, "looking for the best checkpoint") as exchange:
            exchange.local = [best.is_dir(), sharded_checkpoints.is_sharded(best)]
        is_there, is_sharded = exchange.gathered[0]  # rank 0 has made it; others may not see it at once
        if not is_there:
            logger.warning("%s, the best checkpoint, is not there: the model is that of the last step", best.name)
            self.state.best_model_checkpoint = None
        elif is_sharded:
            self.checkpoints.load_weights(best)
        else:
            super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the resumed run is finished: the Trainer would take one more step. Every rank; communicates."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class _PollCheckpoints(TrainerCallback):
    """Check after the first step that the run can be saved, and finish a checkpoint when its last file was written."""

    def __init__(self, checkpoints: ShardedCheckpoints) -> None:
        self._checkpoints, self._is_checked = checkpoints, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check and poll. The Trainer calls this on every rank, before it may save the next checkpoint."""
        if not self._is_checked and args.save_strategy != "no":
            self._is_checked = True
            self._checkpoints.require_saveable()
        self._checkpoints.poll()
