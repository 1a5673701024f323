"""Find out where the time of a run goes: which share of it was spent in steps. Importing this module imports transformers."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from zero_sft.console.progress import format_duration


class WallTime(TrainerCallback):
    """Measure steps, evaluations and what lies between them. Any rank; does not communicate.

    Args:
        seconds_before: returns the seconds of each part from the program's start to the end of the first step.
        waited_for_saves: returns the seconds for which training has waited for checkpoints.
        waited_for_data: returns the seconds for which training has waited for batches.
    """

    def __init__(
        self,
        seconds_before: Callable[[], Mapping[str, float]],
        waited_for_saves: Callable[[], float],
        waited_for_data: Callable[[], float],
    ) -> None:
        self._seconds_before, self._waited_for_saves, self._waited_for_data = seconds_before, waited_for_saves, waited_for_data
        self._began = self._evaluation_began = self._steps = self._evaluations = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to measure a step."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the step."""
        self._steps += time.monotonic() - self._began

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure an evaluation from the end of its first batch."""
        self._evaluation_began = self._evaluation_began or time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the evaluation."""
        if self._evaluation_began:
            self._evaluations += time.monotonic() - self._evaluation_began
        self._evaluation_began = 0.0

    def seconds(self, total: float) -> dict[str, float]:
        """Return the seconds of each part; those that are left of `total` are "other"."""
        before = {name: value for name, value in self._seconds_before().items() if name != "first step"}
        load = before.pop("load", 0.0)
        parts = {
            "steps": self._steps,
            "start": sum(before.values()),
            "load": load,
            "evaluation": self._evaluations,
            "saves": self._waited_for_saves(),
            "data": self._waited_for_data(),
        }
        return {**parts, "other": max(0.0, total - sum(parts.values()))}


def shares_line(parts: Mapping[str, float]) -> str:
    """Say which share of a run was spent in steps, and where the rest went, the largest first. Pure.

    Worked example: "80 % of 1:40 were spent in steps; the rest: start 0:15, load 0:05".
    """
    total = sum(parts.values()) or 1.0
    rest = sorted(((seconds, name) for name, seconds in parts.items() if name != "steps" and seconds >= 0.5), reverse=True)
    names = ", ".join(f"{name} {format_duration(seconds)}" for seconds, name in rest)
    return (
        f"{100 * parts['steps'] / total:.0f} % of {format_duration(total)} were spent in steps"
        + f"; the rest: {names}" * bool(rest)
    )
