"""The checkpoints of a run, and its export: the same config and tokenizer files in both, weights without a gather.

Importing this module imports TRL.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.config import text_config
from zero_sft.errors import ExportError
from zero_sft.job import trainer_internals
from zero_sft.saving.export import save_pretrained
from zero_sft.saving.folder import explained, require_writable
from zero_sft.saving.run_record import RunRecord, write_record
from zero_sft.saving.settings import write_settings
from zero_sft.zero.internals import give_defaults

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """What is written instead of what trains: the tokenizer with the trained chat template, and values of the config.

    `record`: what checkpoints say of the run.
    """

    tokenizer: Any
    record: RunRecord
    config_values: Mapping[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def config_of(self, model: Any) -> Iterator[None]:
        """Give the model's config these values for a while: the trainer's loss has others set."""
        config = text_config(model.config)
        training = {name: getattr(config, name) for name in self.config_values}
        config.update(dict(self.config_values))
        try:
            yield
        finally:
            config.update(training)


class SavingTrainer(SFTTrainer):
    """An `SFTTrainer` that writes checkpoints and exports as this project does, and takes no step where a run is finished.

    Args:
        published: what checkpoints and the export say about the model.
    """

    def __init__(self, *args: Any, published: PublishedModel, **kwargs: Any) -> None:
        trainer_internals.check()
        self._published = published
        super().__init__(*args, **kwargs)
        trainer_internals.check_trainer(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's. Some schedules read the optimizer's `defaults`, which DeepSpeed's optimizer has not."""
        give_defaults(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's; then the rates follow from the schedule, where the optimizer's state has those of the former one.

        A run of 4 steps that goes on to 6 would take its fifth step with the rate of a finished schedule, 0.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        rates = [
            base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def train_to_the_end(self, checkpoint: Path | None) -> Exception | None:
        """Train, and return the error of what follows the last step (a save, a report), which must not cost the model.

        Every rank; communicates. An error before the last step's end is raised.
        """
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            if not 0 < self.state.max_steps <= self.state.global_step:
                raise
            logger.warning("the training is over; then: %s: %s. The model is written first.", type(error).__name__, error)
            return error
        return None

    def export(self, folder: Path) -> None:
        """Write the model with its config and tokenizer to `folder`. Every rank; communicates.

        Raises:
            ExportError: the folder can't be written.
        """
        model: Any = self.model_wrapped
        with self._published.config_of(self.model):
            save_pretrained(model, folder, tokenizer=self._published.tokenizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's config and tokenizer, and its weights where nothing else holds them. Every rank; communicates.

        DeepSpeed's own states, which the Trainer saves next, hold the weights; with `--save_only_model True` there are none.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        engine: Any = self.model_wrapped
        if self.args.save_only_model or not _internal_call or engine.zero_gather_16bit_weights_on_model_save():
            self.export(folder)
            return
        world = World.detect()
        with collective_stage(world, f"writing {folder}"), explained(folder), self._published.config_of(self.model):
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                model: Any = self.model
                write_settings(folder, model, self._published.tokenizer)
                write_record(folder, self._published.record)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, if the folder can be written now; else a warning, and the training goes on. Every rank."""
        folder, world = self.args.output_dir, World.detect()
        try:
            with collective_stage(world, f"checking {folder}"):
                if world.is_main:
                    require_writable(str(folder))
        except ExportError as error:
            if world.is_main:
                logger.warning("no checkpoint of step %d: %s", self.state.global_step, error)
            return
        super()._save_checkpoint(model, trial)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, unless the run that is resumed was finished: it would take one step more. Every rank."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
