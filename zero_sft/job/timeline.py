"""How long a job takes to get going: from the process's start to the end of its first step, part by part.

Source: the process's own start time, as the kernel has it; so imports count, which no clock inside the program sees.
"""

import time
from collections.abc import Mapping
from typing import Any

import psutil


class Timeline:
    """Ends of the parts of a start, in order. Parts are named when they end."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """`part` ends now; it began where the one before ended. A part ends once: later calls change nothing."""
        if part not in self._seconds:
            now = time.time()
            self._seconds[part] = now - self._last
            self._last = now

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds of each part that has ended."""
        return dict(self._seconds)

    def summary(self) -> str:
        """One line for a person."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"the first step ended {sum(self._seconds.values()):.1f} s after the program's start: {parts}"


def trainer_callback(timeline: Timeline, say: Any) -> Any:
    """A callback for the Trainer that ends "engine start" and "first step", and says the summary then.

    Args:
        say: takes the summary's text.
    """
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        """The Trainer makes DeepSpeed's engine just before a training begins."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            timeline.end("engine start")

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            if "first step" not in timeline.seconds:
                timeline.end("evaluation before")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if "first step" not in timeline.seconds:
                timeline.end("first step")
                say(timeline.summary())

    return Marks()
