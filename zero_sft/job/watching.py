"""Watch each step and each batch of an evaluation for ranks that are stuck. Importing this module imports transformers."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zero_sft.cluster import failure_report
from zero_sft.cluster.launcher_watch import leave
from zero_sft.cluster.watchdog import StepTimes, Watchdog, describe_places, places
from zero_sft.cluster.world import World
from zero_sft.errors import DistributedError


class WatchSteps(TrainerCallback):
    """End the run if a step takes far longer than those before it. Every rank; nothing here communicates.

    Args:
        logs: the folder for the stacks of the ranks.
        fixed_limit: seconds for each step; None: as `StepTimes` finds. With 0, nothing is watched.
    """

    def __init__(self, logs: Path, world: World, fixed_limit: float | None) -> None:
        self._logs, self._world, self._fixed = logs, world, fixed_limit
        self._steps, self._batches = StepTimes(fixed_limit), StepTimes(fixed_limit)
        self._began = 0.0
        self._since = time.time()
        self._watchdog: Watchdog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to watch."""
        if self._fixed != 0:
            self._watchdog = Watchdog(self._on_stuck)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Expect the end of this step."""
        self._expect(f"step {state.global_step + 1}", self._steps.limit)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Learn from the step. If this rank is stuck in what follows, others watch for it in their next step."""
        self._learn(self._steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Expect the end of the next batch of an evaluation."""
        if self._began:
            self._learn(self._batches)
        self._expect(f"a batch of the evaluation after step {state.global_step}", self._batches.limit)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Expect nothing."""
        self._done()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the watching thread."""
        self._done()
        if self._watchdog is not None:
            self._watchdog.close()

    def _expect(self, what: str, seconds: float) -> None:
        self._began = time.monotonic()
        if self._watchdog is not None:
            self._watchdog.expect(what, seconds)

    def _learn(self, times: StepTimes) -> None:
        times.add(time.monotonic() - self._began)
        self._done()

    def _done(self) -> None:
        self._began = 0.0
        if self._watchdog is not None:
            self._watchdog.done()

    def _on_stuck(self, what: str, limit: float) -> None:
        def describe() -> DistributedError:
            found = describe_places(places(self._logs, range(self._world.world_size), self._since))
            return DistributedError(
                f"{what} has taken more than {limit:,.0f} s, so a rank is stuck: {found}. The stacks of those that could write "
                f"them are in {self._logs}/stacks_rank_*.txt. Steps that may take longer need --step_timeout SECONDS.",
                code="cluster.stuck",
            )

        failure_report.report_stuck(describe, f"in {what}, which has taken more than {limit:,.0f} s")
        leave(1)
