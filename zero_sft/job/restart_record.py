"""Let rank 0 write how far the run has come, for `launch.sh --max_restarts`. Importing this module imports transformers."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.restarts import ProgressFile, step_of_last_end
from zero_sft.cluster.world import World
from zero_sft.printable import first_of

logger = logging.getLogger("zero_sft.train")


class RestartRecord(TrainerCallback):
    """Every rank; communicates when the training begins, and at the step in which the run has ended before.

    Args:
        checkpoint_step: returns the step of the newest checkpoint; None if there is none.
        places: returns the places of this rank's samples of the present step.
    """

    def __init__(self, world: World, checkpoint_step: Callable[[], int | None], places: Callable[[], list[str]]) -> None:
        self._world, self._checkpoint_step, self._places = world, checkpoint_step, places
        self._file = ProgressFile()
        self._suspect: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree on the step in which the run has ended before. Rank 0 alone may know it."""
        self._suspect = all_gather_json(self._world, step_of_last_end())[0]
        if self._world.is_main:
            self._file.update(checkpoint=self._checkpoint_step())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the step that begins, and the samples of the suspect one."""
        step = state.global_step + 1
        samples: list[str] = []
        if step == self._suspect:
            samples = [place for places in all_gather_json(self._world, self._places()) for place in places]
        if not self._world.is_main:
            return
        if samples:
            logger.warning("the run has ended in step %d before. Its samples: %s", step, first_of(samples, 16, separator="; "))
        self._file.update(step=step, checkpoint=self._checkpoint_step(), samples=samples)
