"""Save a run's checkpoints and export its model, with the same config and tokenizer files in both.

No rank gathers the whole model: each writes its own shards. Importing this module imports TRL.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError
from zero_sft.job import trainer_internals
from zero_sft.rope import text_config
from zero_sft.saving.export import save_pretrained
from zero_sft.saving.folder import explain_write_errors, require_writable
from zero_sft.saving.run_record import RunRecord, write_record
from zero_sft.saving.settings import write_settings
from zero_sft.zero.internals import set_optimizer_defaults

logger = logging.getLogger("zero_sft.train")


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
        config = text_config(model.config)
        self._router_values = {name: getattr(config, name) for name in _ROUTER_KEYS if hasattr(config, name)}
        super().__init__(model=model, **kwargs)
        trainer_internals.require(self, trainer_internals.SET)

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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the Trainer's scheduler. Some schedules read the optimizer's `defaults`, which DeepSpeed's optimizer lacks."""
        set_optimizer_defaults(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as the Trainer does, then set the learning rates from this run's schedule.

        The optimizer's state holds the rates of the previous schedule: a run of 4 steps that is extended to 6 would take its
        fifth step with the last rate of that schedule, 0.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
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
        except Exception as error:
            if not 0 < self.state.max_steps <= self.state.global_step:
                raise
            logger.warning("after the last step: %s: %s. The model is written first.", type(error).__name__, error)
            return error
        return None

    def export(self, folder: Path) -> None:
        """Write the model with its config and tokenizer to `folder`, as `save_pretrained` does. Every rank; communicates."""
        model: Any = self.model_wrapped
        with self._without_trl_changes():
            save_pretrained(model, folder, tokenizer=self._saved_tokenizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's config and tokenizer, and its weights if no other file holds them. Every rank; communicates.

        The Trainer saves DeepSpeed's state next, which holds the weights; with `--save_only_model True` it does not.
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
        """Save a checkpoint if the folder is writable, else log a warning and go on training. Every rank; communicates."""
        folder = str(self.args.output_dir)
        try:
            with collective_stage(self._world, f"checking {folder}"):
                if self._world.is_main:
                    require_writable(folder)
        except ExportError as error:
            if self._world.is_main:
                logger.warning("no checkpoint is saved at step %d: %s", self.state.global_step, error)
            return
        super()._save_checkpoint(model, trial)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the resumed run is finished: the Trainer would take one more step. Every rank; communicates."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
