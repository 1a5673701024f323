"""Save a run's checkpoints for any number of ranks, and give a run the state of one.

`saving/checkpoint_writer.py` describes the files. Two of them are the Trainer's: `trainer_state.json` is its state, as it
saves it, and `training_state.json` has the schedule and the engine's counters. Importing this module imports transformers.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES
from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.checkpoint.manifest import has_manifest, read_manifest
from zero_sft.checkpoint.run_state import TRAINER_STATE_FILE, TRAINING_STATE_FILE, read_training_state
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.printable import with_count
from zero_sft.saving.checkpoint_folders import remove, surplus
from zero_sft.saving.checkpoint_reader import read_random_states, restore_optimizer, restore_own_weights, restore_weights
from zero_sft.saving.checkpoint_saver import CheckpointSaver, SaveReport
from zero_sft.saving.checkpoint_writer import Progress
from zero_sft.saving.export_layout import ExportLayout, on_meta
from zero_sft.saving.folder import explain_write_errors
from zero_sft.saving.forms import form_of
from zero_sft.saving.random_states import restore_random_states
from zero_sft.saving.run_record import RECORD_FILE, RunRecord, record_json
from zero_sft.zero import optimizer_state
from zero_sft.zero.engine_state import engine_state, restore_engine_state

logger = logging.getLogger("zero_sft.train")


def is_sharded(checkpoint: str | Path | None) -> bool:
    """Return whether a folder is a checkpoint of this format."""
    return checkpoint is not None and has_manifest(Path(checkpoint))


class ShardedCheckpoints:
    """Saves the checkpoints of one trainer. Every method is called on every rank, and communicates.

    Args:
        tokenizer: the tokenizer that checkpoints hold.
        record: describes the run in every checkpoint.
    """

    def __init__(self, trainer: Any, tokenizer: Any, record: RunRecord, world: World) -> None:
        self._trainer, self._tokenizer, self._record, self._world = trainer, tokenizer, record, world
        self._form = form_of(trainer.model)
        self._layout: ExportLayout | None = None  # of the weights, from the first checkpoint on
        self._former_best: str | None = None
        self._settings: Mapping[str, bytes] = {}  # config and tokenizer, which a run does not change
        self.newest: Path | None = None  # the checkpoint that was saved last, or from which the run was resumed
        self.last_saved_step: int | None = None
        self.last_save_seconds: float | None = None
        self.blocked_seconds = 0.0
        """The seconds for which training has waited for checkpoints."""
        self.on_complete: Callable[[SaveReport], None] = lambda _: None
        """Called with the report of each complete checkpoint."""
        args = trainer.args
        self._saver = CheckpointSaver(
            world,
            output=Path(args.output_dir),
            save_async=False if _callbacks_read_checkpoints() else args.save_async,
            local_folder=None if args.local_save_dir is None else Path(args.local_save_dir).expanduser(),
            on_error=args.on_save_error,
            on_saved=self._on_saved,
            on_failed=self._on_failed,
        )

    def save(self) -> None:
        """Save a checkpoint of the trainer's present step, or begin to.

        Raises:
            ExportError: with `--on_save_error raise`, the checkpoint can't be written; nothing of it is left.
        """
        self._saver.wait()
        trainer = self._trainer
        state, tensors = trainer.state, self._form.tensors()
        target = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        trainer.store_flos()
        self._keep_best(target)
        self._former_best = state.best_model_checkpoint
        _complete_state(trainer, target)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        dtypes = {str(param.dtype) for param in optimizer_state.trained_parameters(trainer.model_wrapped).values()}
        progress = Progress(
            step=state.global_step,
            samples=state.global_step * self._record.samples_a_step,
            loss=losses[-1] if losses else None,
            dtype=min(dtypes).removeprefix("torch."),  # some modules may be kept in float32, which comes last
        )
        layout = None if trainer.args.save_on_each_node else self._weights_layout(tensors)
        self._saver.save(trainer.model_wrapped, tensors, target, layout, self._small_files, progress)

    def load_weights(self, folder: Path) -> None:
        """Give the model the weights of one of the run's checkpoints. No step may follow.

        Raises:
            CheckpointError: a file can't be read, or is of another release.
        """
        tensors, manifest = self._form.tensors(), read_manifest(folder)
        if manifest.hosts:
            restore_own_weights(tensors, folder, manifest, self._world)
        else:
            restore_weights(tensors, self._weights_layout(tensors), folder, self._world)

    def roll_back(self) -> str | None:
        """Give the model and the optimizer the state of the newest checkpoint, and return its name; None if there is none.

        The step, the schedule and the position in the data stay.

        Raises:
            CheckpointError: a file can't be read.
        """
        self._saver.wait()
        if self.newest is None:
            return None
        self.load_weights(self.newest)
        engine = self._trainer.model_wrapped
        restore_optimizer(engine, self.newest, read_manifest(self.newest), self._world)
        optimizer_state.take_over_weights(engine)
        return self.newest.name

    def _weights_layout(self, tensors: Mapping[str, Any]) -> ExportLayout:
        if self._layout is None:
            self._layout = self._form.choose_layout(on_meta(tensors), MAX_FILE_BYTES, self._world)
        return self._layout

    def _keep_best(self, target: Path) -> None:
        """Give the best checkpoint another name, if one of a later step is to get its name. Every rank; communicates.

        Step numbers are lower after a resume with more samples per step.
        """
        state = self._trainer.state
        if state.best_model_checkpoint != str(target) or state.best_global_step == state.global_step:
            return
        kept = target.with_name(f"{target.name}-best")
        with collective_stage(self._world, f"keeping {target.name}"), explain_write_errors(target):
            if self._world.leads_folder(on_each_node=self._trainer.args.save_on_each_node) and target.is_dir():
                remove(kept)
                target.rename(kept)
        if self._world.is_main:
            logger.info("%s, the best checkpoint, is %s from now on", target, kept.name)
        state.best_model_checkpoint = str(kept)

    def require_saveable(self) -> None:
        """Check that a checkpoint can hold the optimizer's state, as soon as the optimizer has it.

        Without this check, the run would fail only when its first checkpoint is due.

        Raises:
            ExportError: the optimizer keeps values that no single weight has.
        """
        args = self._trainer.args
        if args.checkpoint_format == "sharded" and not args.save_only_model:
            with collective_stage(self._world, "checking the optimizer's state"):
                optimizer_state.state_format(self._trainer.model_wrapped)

    def write_with(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap the function that writes a rank's part of a checkpoint. Does not communicate."""
        self._saver.write_with(wrap)

    def poll(self) -> None:
        """Finish a checkpoint that has been written since the last step, as `CheckpointSaver.poll` does."""
        self._saver.poll()

    def wait(self) -> None:
        """Wait for a checkpoint that is being written."""
        self._saver.wait()

    def _small_files(self) -> dict[str, bytes]:
        """Return the contents of all files without tensors, by path in the folder. Rank 0."""
        trainer = self._trainer
        if not self._settings:
            settings = self._form.settings_files(self._tokenizer)
            self._settings = {**settings, RECORD_FILE: record_json(self._record)}
        training = {"schedule": _schedule(trainer).state_dict(), "engine": engine_state(trainer.model_wrapped)}
        return {
            **self._settings,
            TRAINER_STATE_FILE: _to_json(dataclasses.asdict(trainer.state), sort_keys=True),
            TRAINING_STATE_FILE: _to_json(training),
        }

    def _on_failed(self, target: Path) -> None:
        """Keep the former best checkpoint, if the one that could not be written was to be the best."""
        if self._trainer.state.best_model_checkpoint == str(target):
            self._trainer.state.best_model_checkpoint = self._former_best

    def _on_saved(self, target: Path, report: SaveReport) -> None:
        """Remove the checkpoints beyond `save_total_limit`."""
        self.newest, self.last_saved_step, self.last_save_seconds = target, report.step, report.seconds
        self.blocked_seconds += report.blocked_seconds
        self.on_complete(report)
        if report.owns_folder:
            limit, best = self._trainer.args.save_total_limit, self._trainer.state.best_model_checkpoint
            for folder in surplus(checkpoints_in(target.parent), limit, {target, *([Path(best)] if best else [])}):
                logger.info("removing %s, since --save_total_limit is %d", folder, limit)
                self._saver.run_in_thread(functools.partial(remove, folder))


def restore(trainer: Any, folder: Path, world: World) -> None:
    """Give the engine and the schedule the state in a checkpoint. The model has its weights. Every rank; communicates.

    Raises:
        CheckpointError: a file is damaged, or the optimizer has trained other parameters.
    """
    manifest = read_manifest(folder)
    restore_optimizer(trainer.model_wrapped, folder, manifest, world)
    with collective_stage(world, "restoring the schedule"):
        training = read_training_state(folder)
        _restore_schedule(_schedule(trainer), training["schedule"], folder)
        restore_engine_state(trainer.model_wrapped, training["engine"])
    if manifest.world_size != world.world_size:
        logger.info(
            "%s was saved by %s, and is read by %d: the random generators start from --seed",
            folder.name, with_count(manifest.world_size, "rank"), world.world_size,
        )  # fmt: skip


def _restore_schedule(schedule: Any, saved: Mapping[str, Any], folder: Path) -> None:
    """Give a schedule the saved values of the names that it has, each of the type that it has."""
    own = schedule.state_dict()
    for name in own.keys() & saved.keys():
        kinds = {type(own[name]), type(saved[name])}
        is_alike = len(kinds) == 1 or kinds <= {int, float, bool} or kinds <= {list, tuple} or type(None) in kinds
        if not is_alike:
            raise CheckpointError(
                f"{folder / TRAINING_STATE_FILE} has {saved[name]!r:.40} for {name} of the schedule, in place of a "
                f"{type(own[name]).__name__}. Take another checkpoint.",
                code="resume.bad_training_state",
            )
    schedule.load_state_dict({**own, **{name: value for name, value in saved.items() if name in own}})


def restore_generators(folder: Path, world: World) -> None:
    """Set this rank's random generators to their states in a checkpoint, if as many ranks saved it. Any rank."""
    states = read_random_states(folder, read_manifest(folder), world)
    if states is not None:
        restore_random_states(states)


def change_steps(state: Any, change: Callable[[int], int]) -> None:
    """Give the Trainer's state the step numbers of a run whose steps have another number of samples."""
    state.global_step = change(state.global_step)
    if state.best_global_step:
        state.best_global_step = change(state.best_global_step)
    for entry in state.log_history:
        entry["step"] = change(entry["step"])


def set_deepspeed_rates(trainer: Any, step_now: Callable[[int], int]) -> None:
    """Set the learning rates from DeepSpeed's schedule, if its config has one. The optimizer's are not in a checkpoint.

    Args:
        step_now: returns the number in this run of a step of the checkpoint.
    """
    schedule = trainer.model_wrapped.lr_scheduler
    if hasattr(schedule, "last_batch_iteration"):
        schedule.last_batch_iteration = step_now(schedule.last_batch_iteration)
        for group, rate in zip(trainer.model_wrapped.optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate


def _callbacks_read_checkpoints() -> bool:
    """Return whether a report callback of transformers takes each checkpoint's folder as soon as it was saved."""
    takes_artifacts = os.environ.get("HF_MLFLOW_LOG_ARTIFACTS", "").upper() in ("TRUE", "1", "YES", "ON")
    return takes_artifacts or os.environ.get("WANDB_LOG_MODEL", "").lower() == "checkpoint"


def _schedule(trainer: Any) -> Any:
    """Return the schedule: DeepSpeed's, if its config has one, else the Trainer's."""
    return trainer.model_wrapped.lr_scheduler or trainer.lr_scheduler


def _complete_state(trainer: Any, target: Path) -> None:
    """Complete the Trainer's state as it does itself before it saves: the best checkpoint, and the callbacks' states."""
    state = trainer.state
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(target)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name, saved = type(callback).__name__, callback.state()
            if isinstance(state.stateful_callbacks[name], list):
                state.stateful_callbacks[name].append(saved)
            else:
                state.stateful_callbacks[name] = saved


def _to_json(values: Mapping[str, Any], *, sort_keys: bool = False) -> bytes:
    """Return JSON; numbers of numpy and torch are converted."""
    return (json.dumps(values, indent=2, sort_keys=sort_keys, default=lambda value: value.item()) + "\n").encode()
