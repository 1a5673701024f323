"""Log a training: one line for each logged step and each evaluation, with the time left.

    step 12/23  epoch 0.52  loss 2.941  lr 1.8e-05  grad 1.32  7,105 tok/s/GPU  38% MFU  61.2 GiB  2:41 left
    step 12/23  epoch 0.52  eval loss 2.310  10 samples in 3.1 s

It replaces the Trainer's callbacks that print dicts. The lines show the metrics to watch during a run; `logs/history.json`
holds all of them. Importing this module imports transformers.
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

from zero_sft.cluster import stage_watch
from zero_sft.console import progress
from zero_sft.console.progress import format_duration
from zero_sft.job.device_use import device_name, peak_flops, peak_memory
from zero_sft.job.timeline import Timeline
from zero_sft.printable import with_count

logger = logging.getLogger("zero_sft.train")

_STEP_METRICS = (
    ("loss", "loss", ".3f"), ("aux_loss", "aux loss", ".3f"), ("learning_rate", "lr", ".1e"), ("grad_norm", "grad", ".3g"),
)  # fmt: skip
"""The metrics of a training step in a line of the log: the Trainer's name, ours, and the format."""

_SHOWN_CHANGE = 0.05
"""The share of trained tokens is shown again when it has changed by this."""

_NO_ESTIMATE = "time left: available after two steps"


class StepLog(TrainerCallback):
    """Log metrics as lines, and show training and evaluation as tasks of `zero_sft.console.progress`.

    Added on every rank. Rank 0 logs; with `log_on_each_node` the first rank of every other node also prints.

    Args:
        tokens: a function that returns the number of tokens that all ranks have computed in the whole run.
        row_name: the name of a batch's elements in the log, "samples" or "packed rows".
        timeline: ends with the first step, when its summary is logged.
        flops_per_token: operations for a token; None if their number is not known.
    """

    def __init__(
        self, tokens: Callable[[], int], row_name: str, timeline: Timeline, flops_per_token: Callable[[], int | None]
    ) -> None:
        self._tokens, self._row_name, self._timeline = tokens, row_name, timeline
        self._flops_per_token, self._peak = flops_per_token, peak_flops(device_name())
        self._training_stack, self._evaluation_stack = contextlib.ExitStack(), contextlib.ExitStack()
        self._task: progress.Task | None = None
        self._evaluation_task: progress.Task | None = None
        self._pace = Pace()
        self._throughput = Throughput(0, 0.0)
        self._memory = 0  # the most that a line has shown
        self._trained_share = -1.0  # that of the last line that has shown it
        self._metrics = ""  # the last logged step and its metrics
        self._not_finite: list[int] = []  # the logged steps whose loss was not finite

    def wait_for_engine(self) -> None:
        """Show a task for the start of DeepSpeed's engine, until the training begins. Every rank; does not communicate."""
        self._training_stack.enter_context(progress.task("starting the engine"))
        self._training_stack.enter_context(stage_watch.during("starting the engine"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the size of the training, and start its task. The Trainer has just started DeepSpeed's engine."""
        self._timeline.end("engine start")
        self._pace, self._throughput = Pace(), Throughput(self._tokens(), time.monotonic())
        _log_line(args, state, _plan_line(args, state, self._row_name))
        self._training_stack.close()
        if state.is_world_process_zero:
            self._task = self._training_stack.enter_context(progress.task("training", state.max_steps, "steps"))
            self._task.note(_NO_ESTIMATE)
            self._task.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the step. The Trainer logs, evaluates and saves after this call."""
        now = time.monotonic()
        self._pace.step(state.global_step, now)
        self._throughput.add(now)
        if self._pace.steps == 1:
            self._timeline.end("first step")
            logger.info(self._timeline.summary())
        if self._task is not None:
            self._task.note(_joined(self._metrics, _time_left(self._pace, state)) or _NO_ESTIMATE)
            self._task.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Log one line."""
        if logs is None:
            return
        if "loss" in logs:
            if not math.isfinite(float(logs["loss"])):  # `loss_checks.py` has said more
                self._not_finite.append(state.global_step)
            rate = self._throughput.tokens_per_second(self._tokens())
            metrics = _joined(training_metrics(logs), *self._use(rate, args.world_size), self._trained(logs))
            self._metrics = f"at step {state.global_step}: {metrics}"
            position = _position(logs, state.global_step, state.max_steps)
            line = _joined(position, metrics, _time_left(self._pace, state))
            if self._task is not None:
                self._task.line_logged()
        elif "train_runtime" in logs:
            line = finished_line(logs, self._pace.steps)
        elif any(name.startswith("eval_") for name in logs):
            line = evaluation_line(logs, state.global_step, state.max_steps)
        else:
            line = other_line(logs, state.global_step, state.max_steps)
        if line:
            _log_line(args, state, line)

    def _use(self, tokens_per_second: float | None, ranks: int) -> list[str]:
        """Describe the use of a device: tokens per second, the share of its peak, and the most memory, where that has grown."""
        parts = []
        memory, flops = peak_memory(), self._flops_per_token()
        if tokens_per_second is not None:
            rate = tokens_per_second / ranks
            parts.append(f"{rate:,.0f} tok/s/{'rank' if memory is None else 'GPU'}")
            if self._peak and flops:
                parts.append(f"{100 * rate * flops / self._peak:.0f}% MFU")
        if memory is not None and memory > 1.01 * self._memory:
            self._memory = memory
            parts.append(progress.format_bytes(memory))
        return parts

    def _trained(self, logs: Mapping[str, Any]) -> str:
        """Describe the share of the tokens that were trained on, where it has changed: with most data it hardly does."""
        share = logs.get("trained_share")
        if share is None or abs(share - self._trained_share) < _SHOWN_CHANGE:
            return ""
        self._trained_share = share
        return f"{100 * share:.0f}% trained"

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Show the evaluation's progress, in batches of this rank."""
        if not state.is_world_process_zero:
            return
        if self._evaluation_task is None:
            task = progress.task("evaluating", len(eval_dataloader), "batches")
            self._evaluation_task = self._evaluation_stack.enter_context(task)
        self._evaluation_task.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the evaluation's task, and exclude its time from the throughput."""
        self._evaluation_stack.close()
        self._evaluation_task = None
        self._throughput.resume(time.monotonic())
        if not self._pace.steps:
            self._timeline.end("evaluation before")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the checkpoint's folder, and exclude the time of the save from the throughput."""
        self._throughput.resume(time.monotonic())
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # Called even if no checkpoint was saved; the others are logged when they are complete.
        if (args.checkpoint_format == "deepspeed" or args.save_only_model) and folder.is_dir():
            logger.info("checkpoint: %s", folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the training's task, and warn again if losses were not finite, since that affects the exported model."""
        if self._not_finite and state.is_world_process_zero:
            count, first = len(self._not_finite), self._not_finite[0]
            logger.warning("the loss was not finite in %d of the logged steps, first at step %d", count, first)
        self._training_stack.close()
        self._task = None


class Pace:
    """Estimate the time left from this process's steps after its first, evaluations and saves included."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self.steps = 0

    def step(self, step: int, now: float) -> None:
        """Record the end of a step."""
        self._first = self._first or (step, now)
        self._last = (step, now)
        self.steps += 1

    def seconds_left(self, max_steps: int) -> float | None:
        """Return the seconds until the last step; None if it has ended, or if the second step has not.

        The first step is a warm-up.
        """
        if self._first is None or self._last[0] == self._first[0] or self._last[0] >= max_steps:
            return None
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return seconds / steps * (max_steps - self._last[0])


class Throughput:
    """Measure tokens per second between two logged steps, without the time of evaluations and saves.

    Args:
        tokens: the run's token count at the start of the measurement, which includes the tokens of a resumed run.
        now: the time at which the next step begins.
    """

    def __init__(self, tokens: int, now: float) -> None:
        self._seconds, self._since, self._counted_tokens = 0.0, now, tokens

    def resume(self, now: float) -> None:
        """Start the time of the next step at `now`."""
        self._since = now

    def add(self, now: float) -> None:
        """Add the time of a step that ends at `now`, where the next step begins."""
        self._seconds += now - self._since
        self._since = now

    def tokens_per_second(self, tokens: int) -> float | None:
        """Return the rate since the last call; None if no time has passed. `tokens` counts the whole run."""
        rate = (tokens - self._counted_tokens) / self._seconds if self._seconds > 0 else None
        self._counted_tokens, self._seconds = tokens, 0.0
        return rate


def training_metrics(logs: Mapping[str, Any]) -> str:
    """Format the metrics of a logged step; missing metrics are left out. Pure."""
    return _joined(*(f"{label} {_number(logs[name], spec)}" for name, label, spec in _STEP_METRICS if name in logs))


def evaluation_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Format the line of an evaluation on one dataset, or on several named ones. Pure."""
    losses = [f"{name.replace('_', ' ')} {_number(value, '.3f')}" for name, value in logs.items() if name.endswith("_loss")]
    runtime = next((value for name, value in logs.items() if name.endswith("_runtime")), None)
    rate = next((value for name, value in logs.items() if name.endswith("_samples_per_second")), None)
    duration = ""
    if runtime is not None:
        samples = f"{round(float(rate) * float(runtime)):,} samples in " if rate is not None else ""
        duration = f"{samples}{float(runtime):,.1f} s"
    return _joined(_position(logs, step, steps), *losses, duration)


def finished_line(logs: Mapping[str, Any], steps: int) -> str:
    """Format the last line of a training; `steps` counts the steps of this process. Pure."""
    loss = f", mean loss {_number(logs['train_loss'], '.3f')}" if "train_loss" in logs and steps else ""
    return f"trained {with_count(steps, 'step')} in {format_duration(float(logs['train_runtime']))}{loss}"


def other_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Format metrics that another callback logs, each with its name. Pure."""
    values = [f"{name} {_number(value, '.4g')}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    return "  ".join([_position(logs, step, steps), *values]) if values else ""


def _time_left(pace: Pace, state: Any) -> str:
    seconds = pace.seconds_left(state.max_steps)
    return "" if seconds is None else f"{format_duration(seconds)} left"


def _position(logs: Mapping[str, Any], step: int, steps: int) -> str:
    epoch = f"  epoch {_number(logs['epoch'], '.2f')}" if "epoch" in logs else ""
    return f"step {step}/{steps}{epoch}"


def _number(value: Any, format_spec: str) -> str:
    return format(float(value), format_spec) if isinstance(value, int | float) else str(value)


def _plan_line(args: Any, state: Any, row_name: str) -> str:
    """Format the line with the number of steps and the batch size of a training."""
    if state.global_step >= state.max_steps:
        return f"training: no step is left, the run has reached step {state.global_step:,} of {state.max_steps:,}"
    ranks, per_rank, accumulation = args.data_ranks, args.per_device_train_batch_size, args.gradient_accumulation_steps
    factors = [with_count(ranks, "rank"), f"{per_rank} on each"]
    if args.sequence_parallel_size > 1:
        factors = [
            f"{args.world_size} ranks, {args.sequence_parallel_size} of which share each row",
            f"{per_rank} in each group",
        ]
    factors += [f"{accumulation} times before each update"] if accumulation > 1 else []
    steps = (
        f"steps {state.global_step + 1:,} to {state.max_steps:,}" if state.global_step else with_count(state.max_steps, "step")
    )
    rows = with_count(ranks * per_rank * accumulation, row_name.removesuffix("s"))
    return f"training: {steps}, {rows} per step ({' x '.join(factors)})"


def _joined(*parts: str) -> str:
    return "  ".join(filter(None, parts))


def _log_line(args: Any, state: Any, line: str) -> None:
    if state.is_world_process_zero:
        logger.info(line)
    elif args.log_on_each_node and state.is_local_process_zero:
        sys.stdout.write(f"[rank {args.process_index}] {line}\n")
        sys.stdout.flush()
