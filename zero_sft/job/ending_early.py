"""End a run before its last step, with a checkpoint, at a step on which all ranks agree.

A signal, a file named `stop` in the output folder, or a time limit asks for it. Each rank sees its own signals, and rank 0 the
file and the time, so the ranks exchange what they see at each step. The exchange begins before the step and is read after it:
its time is hidden behind the step, and a request during a step ends the run after the next one.

Importing this module imports transformers.
"""

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from zero_sft.cluster import early_end
from zero_sft.cluster.control_group import all_gather_json, start_agreement
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.printable import first_of

logger = logging.getLogger("zero_sft.train")

STOP_FILE = "stop"
"""Name of the file in the output folder that ends a run."""

LOOK_SECONDS = 1.0
"""Least time between two looks for the file, which may be on a slow file system."""

_NO_SAVE_SHARE = 0.05
"""The share of the time limit that is kept for a checkpoint while none has been saved yet."""


class EvaluationEndedEarly(Exception):
    """An evaluation that all ranks leave at the same batch."""


class EndEarly(TrainerCallback):
    """Let all ranks end the run at the same step, if one of them is asked to. Every rank; communicates at each step.

    Args:
        max_seconds: seconds after the program's start at which the run has to be over; None: no limit.
        save_seconds: returns how long the last checkpoint took to save; None: there was none.
    """

    def __init__(
        self, output: Path, world: World, *, max_seconds: float | None, save_seconds: Callable[[], float | None]
    ) -> None:
        self._file, self._world, self._max_seconds, self._save_seconds = output / STOP_FILE, world, max_seconds, save_seconds
        self._started = psutil.Process().create_time()
        self._looked = self._step_began = self._longest_step = 0.0
        self._is_file_there = False
        self._agreement: Callable[[], int] | None = None
        self._is_training = False
        self.cause = ""
        """Why the run ends early; the same on every rank."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to watch evaluations. The Trainer calls this on every rank."""
        self._is_training = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to exchange what the ranks see."""
        self._finish_exchange()
        self._step_began = time.monotonic()
        self._agreement = start_agreement(self._world, self._is_asked())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """If a rank was asked to end the run, save a checkpoint of this step and end."""
        self._longest_step = max(0.9 * self._longest_step, time.monotonic() - self._step_began)
        if self._finish_exchange():
            self._agree_on_cause()
            control.should_save, control.should_training_stop, control.should_evaluate = True, True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and evaluate nothing more, if the run ends early."""
        if self.cause:
            control.should_save = control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave an evaluation during the training, if a rank was asked to end the run.

        Raises:
            EvaluationEndedEarly: on every rank, at the same batch.
        """
        if not self._is_training:
            return
        if self._finish_exchange():
            self._agree_on_cause()
            raise EvaluationEndedEarly
        self._agreement = start_agreement(self._world, self._is_asked())

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the last exchange of an evaluation; the next step repeats what it says."""
        self._finish_exchange()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop watching: what follows is the end of the run."""
        self._finish_exchange()
        self._is_training = False

    def _finish_exchange(self) -> bool:
        """Return whether a rank was asked when the exchange began."""
        agreement, self._agreement = self._agreement, None
        return agreement is not None and agreement() > 0

    def _is_asked(self) -> int:
        """Return 1 if this rank was asked to end the run. Does not communicate."""
        if early_end.recorded_signal():
            return 1
        return int(self._world.is_main and (self._sees_file() or self._is_time_over()))

    def _sees_file(self) -> bool:
        if not self._is_file_there and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._is_file_there = self._file.exists()
        return self._is_file_there

    def _is_time_over(self) -> bool:
        """Return whether the next two steps and a checkpoint would take longer than there is time."""
        if self._max_seconds is None:
            return False
        save = self._save_seconds()
        needed = 2 * self._longest_step + (_NO_SAVE_SHARE * self._max_seconds if save is None else save)
        return time.time() - self._started + needed >= self._max_seconds

    def _agree_on_cause(self) -> None:
        """Exchange why the run ends. Every rank; communicates."""
        own = early_end.recorded_signal() and f"{early_end.recorded_signal()} on {socket.gethostname()}"
        if not own and self._world.is_main:
            own = f"the file {self._file}" if self._is_file_there else "--max_time" if self._is_time_over() else ""
        causes = list(dict.fromkeys(filter(None, all_gather_json(self._world, own))))
        self.cause = first_of(causes) or "a request that was withdrawn"
        if self._world.is_main:
            logger.info("the run ends early, on %s: saving a checkpoint", self.cause)
            try:
                self._file.unlink(missing_ok=True)  # the next start is not meant
            except OSError as error:  # it is a folder, or this user may not
                logger.warning("%s can't be removed: %s. Remove it before the next start.", self._file, error.strerror or error)


def remove_stop_file(output: Path) -> None:
    """Remove a file that asked an earlier run to end. Rank 0.

    Raises:
        ArgumentError: it is a folder.
        OSError: it can't be removed.
    """
    if (output / STOP_FILE).is_dir():
        raise ArgumentError(
            f"{output / STOP_FILE} is a folder, and a file of this name ends a run. Remove it.",
            code="arguments.stop_is_a_folder",
        )
    if (output / STOP_FILE).exists():
        logger.warning("%s was there before this run, which removes it", output / STOP_FILE)
        (output / STOP_FILE).unlink(missing_ok=True)
