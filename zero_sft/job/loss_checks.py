"""Find losses and gradients that are not finite, and losses that jump, and name the samples. This module imports transformers.

DeepSpeed's ZeRO-3 optimizer leaves a step out if the norm of the gradient is not finite. The norm is that of all ranks, so all
of them leave it out, and the weights stay as they were. Here the ranks find that out, without a further synchronisation of the
device in the steps where nothing is wrong.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.world import World
from zero_sft.data.places import find_places, samples_of_batch
from zero_sft.errors import Scope, TrainingError
from zero_sft.printable import first_of
from zero_sft.zero.engine_state import step_was_skipped, uses_loss_scale

if TYPE_CHECKING:
    import datasets

    from zero_sft.job.trainer import JobTrainer

logger = logging.getLogger("zero_sft.train")

MOST_IN_A_ROW = 10
"""A run that leaves out this number of steps in a row has diverged."""

MOST_ROLLBACKS = 3
"""The number of times that a run may go back to a checkpoint."""

_LEAST_LOSSES = 20
"""The number of logged losses before one of them may count as a jump."""

_NAMED_SAMPLES = 8


class LossChecks(TrainerCallback):
    """React to numbers that are not usable. Every rank; communicates only when there are some.

    Args:
        samples: returns the training samples before they are packed, of streamed data those in memory.
        on_nan: "stop" ends the run; "skip" trains on without the step; "rollback" restores the newest checkpoint first.
        spike_factor: a loss above this many times the median of the last ones is a warning; 0: none is.
        roll_back: restores the newest checkpoint, and returns its name; None if there is none.
    """

    def __init__(
        self,
        trainer: "JobTrainer",
        samples: "Callable[[], datasets.Dataset]",
        world: World,
        *,
        on_nan: Literal["stop", "skip", "rollback"],
        spike_factor: float,
        roll_back: Callable[[], str | None],
    ) -> None:
        self._trainer, self._samples, self._world = trainer, samples, world
        self._on_nan, self._spike_factor, self._roll_back = on_nan, spike_factor, roll_back
        self._in_a_row = self._rollbacks = 0
        self._losses: deque[float] = deque(maxlen=50)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """React to a step that the optimizer has left out.

        Raises:
            TrainingError: on every rank; the run has to stop.
        """
        engine: Any = self._trainer.model_wrapped
        if not step_was_skipped(engine):
            self._in_a_row = 0
            return
        losses = [float(loss) for loss in self._trainer.step_losses]
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        gathered = all_gather_json(self._world, [bad, self._places_of(bad)])
        if uses_loss_scale(engine) and not any(bad for bad, _ in gathered):
            return  # the scale was too large
        self._in_a_row += 1
        what = f"step {state.global_step}: {_describe(gathered)}. The optimizer has left the step out"
        if self._on_nan == "stop":
            raise TrainingError(
                f"{what}, and the run ends (--on_nan stop). Look at these samples, and try a lower --learning_rate or more "
                "--warmup_steps. To train on without such steps, resume with --on_nan skip, or with rollback.",
                code="training.not_finite",
                scope=Scope.ALL_RANKS,
            )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise TrainingError(
                f"{what}, as it has the {MOST_IN_A_ROW - 1} before: the run has diverged. Resume from an earlier checkpoint "
                "with a lower --learning_rate.",
                code="training.diverged",
                scope=Scope.ALL_RANKS,
            )
        if self._world.is_main:
            logger.warning("%s", what)
        if self._on_nan == "rollback":
            self._go_back(what)

    def _go_back(self, what: str) -> None:
        self._rollbacks += 1
        if self._rollbacks > MOST_ROLLBACKS:
            raise TrainingError(
                f"{what}; the run has gone back to a checkpoint {MOST_ROLLBACKS} times already. Resume with a lower "
                "--learning_rate.",
                code="training.diverged",
                scope=Scope.ALL_RANKS,
            )
        name = self._roll_back()
        if name is None:
            raise TrainingError(
                f"{what}, and there is no complete checkpoint to go back to (--on_nan rollback). Save the first one "
                "earlier (--save_steps), or give --on_nan skip.",
                code="training.no_checkpoint_to_go_back_to",
                scope=Scope.ALL_RANKS,
            )
        if self._world.is_main:
            logger.warning("weights and optimizer are those of %s again; the samples since then are not trained on", name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Warn about a loss that jumps. The logged loss is that of all ranks."""
        loss = (logs or {}).get("loss")
        if loss is None or not math.isfinite(float(loss)):
            return
        median = statistics.median(self._losses) if len(self._losses) >= _LEAST_LOSSES else math.inf
        self._losses.append(float(loss))
        if not self._spike_factor or loss <= self._spike_factor * median:
            return
        own = sum(map(float, self._trainer.step_losses))
        gathered = all_gather_json(self._world, [own, self.places()])
        if self._world.is_main:
            rank, (_, places) = max(enumerate(gathered), key=lambda row: row[1][0])
            steps = f"; the mean of {args.logging_steps:g} steps" * (args.logging_steps > 1)
            logger.warning(
                "step %d: the loss is %.3f, more than %g times the median of those before (%.3f)%s. It is highest on rank %d%s",
                state.global_step, loss, self._spike_factor, median, steps, rank, _named(places),
            )  # fmt: skip

    def places(self) -> list[str]:
        """Return the places of this rank's samples of the present step. Does not communicate."""
        return self._places_of(range(len(self._trainer.step_batches)))

    def _places_of(self, numbers: Any) -> list[str]:
        """Return the places of the samples in these batches of this rank."""
        batches = self._trainer.step_batches
        return [
            place
            for number in numbers
            if number < len(batches)
            for place in find_places(self._samples(), samples_of_batch(batches[number]))
        ]


def _describe(gathered: list[Any]) -> str:
    """Say on which ranks the loss is not finite, and on which samples. Pure."""
    ranks = [rank for rank, (bad, _) in enumerate(gathered) if bad]
    if not ranks:
        return "the gradient is not finite, though the losses of all ranks are"
    places = [place for bad, rank_places in gathered if bad for place in rank_places]
    return f"the loss is not finite on rank {first_of(ranks, 8)}{_named(places)}"


def _named(places: list[str]) -> str:
    return f" ({first_of(places, _NAMED_SAMPLES, separator='; ')})" if places else ""
