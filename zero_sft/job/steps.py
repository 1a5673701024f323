"""The log of a training: one line for each logged step and evaluation, and how much is left.

    step 12/23  epoch 0.52  loss 2.941  lr 1.8e-05  grad 1.32  1,105 tok/s  2:41 left
    step 12/23  epoch 0.52  eval loss 2.310  10 samples in 3.1 s

It takes the place of the Trainer's own callbacks that print dicts. All metrics are in `logs/history.json`; here are those
that one follows while a run goes on. Importing this module imports transformers.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zero_sft.console import progress
from zero_sft.console.progress import clock

logger = logging.getLogger("zero_sft.train")


_FIRST_STEP = "time left: known after two steps"


class StepLog(TrainerCallback):
    """Logs metrics as lines, and shows training and evaluation as tasks of `zero_sft.console.progress`.

    Added on every rank; rank 0 says it, and with `log_on_each_node` the first rank of every other node, too.

    Args:
        tokens: how many tokens all ranks together have computed so far, in the whole run.
        rows: what a batch is made of: "samples", or "packed rows".
    """

    def __init__(self, tokens: Callable[[], int], rows: str) -> None:
        self._tokens, self._rows = tokens, rows
        self._training, self._evaluation = contextlib.ExitStack(), contextlib.ExitStack()
        self._task: progress.Task | None = None
        self._evaluation_task: progress.Task | None = None
        self._pace = Pace()
        self._throughput = Throughput()
        self._metrics = ""  # of the last step that was logged
        self._not_finite: list[int] = []  # the logged steps whose loss is no number

    def wait_for_engine(self) -> None:
        """Show that DeepSpeed's engine is being made, until the training begins. Called on every rank."""
        self._training.enter_context(progress.task("starting the engine"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how much there is to do."""
        self._pace, self._throughput = Pace(), Throughput()
        self._throughput.resume(time.monotonic())
        self._throughput.measured_from(self._tokens())
        if _speaks(args, state):
            _say(args, state, _plan(args, state, self._rows))
        self._training.close()
        if state.is_world_process_zero:
            self._task = self._training.enter_context(progress.task("training", state.max_steps, "steps"))
            self._task.note(_FIRST_STEP)
            self._task.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure; the Trainer logs after it, then evaluates, then saves."""
        now = time.monotonic()
        self._pace.step(state.global_step, now)
        self._throughput.add(now)
        if self._task is not None:
            self._task.note("  ".join(filter(None, [self._metrics, _left(self._pace, state)])) or _FIRST_STEP)
            self._task.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Say one line."""
        if logs is None:
            return
        if "loss" in logs:
            self._watch_loss(logs["loss"], args, state)
            rate = self._throughput.tokens_a_second(self._tokens())
            self._metrics = training_metrics(logs, rate)
            where = _where(logs, state.global_step, state.max_steps)
            line = "  ".join(filter(None, [where, self._metrics, _left(self._pace, state)]))
            if self._task is not None:
                self._task.spoken()
        elif "train_runtime" in logs:
            line = finished_line(logs, self._pace.steps)
        elif any(name.startswith("eval_") for name in logs):
            line = evaluation_line(logs, state.global_step, state.max_steps)
        else:
            line = other_line(logs, state.global_step, state.max_steps)
        if line and _speaks(args, state):
            _say(args, state, line)

    def _watch_loss(self, loss: Any, args: Any, state: Any) -> None:
        """Warn at the first loss that is not finite."""
        if math.isfinite(float(loss)):
            return
        if not self._not_finite and state.is_world_process_zero:
            logger.warning(
                "the loss is %s at step %d: the run diverges, or the model or its data is broken. A lower --learning_rate, "
                "more --warmup_steps and --max_grad_norm 1.0 are what helps most often.", loss, state.global_step,
            )  # fmt: skip
        self._not_finite.append(state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Show the evaluation's progress, in batches of this rank."""
        if not state.is_world_process_zero:
            return
        if self._evaluation_task is None:
            with contextlib.suppress(TypeError):  # a loader without a length
                task = progress.task("evaluating", len(eval_dataloader), "batches")
                self._evaluation_task = self._evaluation.enter_context(task)
        if self._evaluation_task is not None:
            self._evaluation_task.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the evaluation's bar; its time is not the steps'."""
        self._evaluation.close()
        self._evaluation_task = None
        self._throughput.resume(time.monotonic())

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say where a checkpoint is; its time is not the steps'."""
        self._throughput.resume(time.monotonic())
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # the Trainer says so whatever became of it
            logger.info("checkpoint: %s", folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the bar, and say again what the exported model is worth."""
        if self._not_finite and state.is_world_process_zero:
            count, first = len(self._not_finite), self._not_finite[0]
            logger.warning("the loss was not finite in %d of the logged steps, first at step %d", count, first)
        self._training.close()
        self._task = None


class Pace:
    """Time left, from the steps since the first one of this process, with the evaluations and saves between them."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self.steps = 0

    def step(self, step: int, now: float) -> None:
        """A step has ended."""
        self._first = self._first or (step, now)
        self._last = (step, now)
        self.steps += 1

    def seconds_left(self, max_steps: int) -> float | None:
        """Until the last step; None at it, and before the second step, since the first one warms up."""
        if self._first is None or self._last[0] == self._first[0] or self._last[0] >= max_steps:
            return None
        done, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return seconds / done * (max_steps - self._last[0])


class Throughput:
    """Tokens a second since the last time that somebody asked, without the time of evaluations and saves."""

    def __init__(self) -> None:
        self._seconds, self._since, self._before = 0.0, 0.0, 0

    def measured_from(self, tokens: int) -> None:
        """The tokens of the run before anything is measured: those of the run that is resumed."""
        self._before = tokens

    def resume(self, now: float) -> None:
        """Time runs from now on."""
        self._since = now

    def add(self, now: float) -> None:
        """A step has ended, and the next one begins."""
        self._seconds += now - self._since
        self._since = now

    def tokens_a_second(self, tokens: int) -> float | None:
        """Since the last call; None where no time has passed."""
        rate = (tokens - self._before) / self._seconds if self._seconds > 0 else None
        self._before, self._seconds = tokens, 0.0
        return rate


def training_metrics(logs: Mapping[str, Any], tokens_a_second: float | None) -> str:
    """The metrics of a logged step; a metric that the log does not have is left out. Pure."""
    words = [
        f"loss {_number(logs['loss'], '.3f')}",
        f"aux loss {_number(logs['aux_loss'], '.3f')}" if "aux_loss" in logs else "",
        f"lr {_number(logs['learning_rate'], '.1e')}" if "learning_rate" in logs else "",
        f"grad {_number(logs['grad_norm'], '.3g')}" if "grad_norm" in logs else "",
        f"{tokens_a_second:,.0f} tok/s" if tokens_a_second is not None else "",
    ]
    return "  ".join(filter(None, words))


def evaluation_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """The line of an evaluation, of one set or of several by name. Pure."""
    losses = [f"{name.replace('_', ' ')} {_number(value, '.3f')}" for name, value in logs.items() if name.endswith("_loss")]
    runtime = next((value for name, value in logs.items() if name.endswith("_runtime")), None)
    rate = next((value for name, value in logs.items() if name.endswith("_samples_per_second")), None)
    took = ""
    if runtime is not None:
        samples = f"{round(float(rate) * float(runtime)):,} samples in " if rate is not None else ""
        took = f"{samples}{float(runtime):,.1f} s"
    return "  ".join(filter(None, [_where(logs, step, steps), *losses, took]))


def finished_line(logs: Mapping[str, Any], steps: int) -> str:
    """The last line of a training; `steps` are those of this process. Pure."""
    loss = f", mean loss {_number(logs['train_loss'], '.3f')}" if "train_loss" in logs and steps else ""
    return f"trained {steps:,} step{'s' * (steps != 1)} in {clock(float(logs['train_runtime']))}{loss}"


def other_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Metrics that somebody else's callback logs, name by name. Pure."""
    values = [f"{name} {_number(value, '.4g')}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    return "  ".join([_where(logs, step, steps), *values]) if values else ""


def _left(pace: Pace, state: Any) -> str:
    seconds = pace.seconds_left(state.max_steps)
    return "" if seconds is None else f"{clock(seconds)} left"


def _where(logs: Mapping[str, Any], step: int, steps: int) -> str:
    epoch = f"  epoch {_number(logs['epoch'], '.2f')}" if "epoch" in logs else ""
    return f"step {step}/{steps}{epoch}"


def _number(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else str(value)


def _plan(args: Any, state: Any, rows: str) -> str:
    """What a training is made of, for the log."""
    if state.global_step >= state.max_steps:
        return f"training: no step is left, the run has reached step {state.global_step:,} of {state.max_steps:,}"
    ranks, each, accumulated = args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps
    factors = [f"{ranks} rank{'s' * (ranks > 1)}", f"{each} on each"]
    factors += [f"{accumulated} times before each update"] if accumulated > 1 else []
    steps = f"steps {state.global_step + 1:,} to {state.max_steps:,}" if state.global_step else f"{state.max_steps:,} steps"
    return (
        f"training: {steps}, {ranks * each * accumulated:,} {rows} a step ({' x '.join(factors)}); "
        "tok/s counts the tokens of all ranks"
    )


def _speaks(args: Any, state: Any) -> bool:
    return state.is_world_process_zero or (args.log_on_each_node and state.is_local_process_zero)


def _say(args: Any, state: Any, line: str) -> None:
    if state.is_world_process_zero:
        logger.info(line)
    else:
        sys.stdout.write(f"[rank {args.process_index}] {line}\n")
        sys.stdout.flush()
