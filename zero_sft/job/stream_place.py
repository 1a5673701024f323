"""The place of a run with `--streaming` in its data: kept in its checkpoints, and found again when it is resumed."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from zero_sft.checkpoint.run_state import read_trainer_state
from zero_sft.data.stream import StreamState
from zero_sft.saving.resume_step import step_of_same_sample
from zero_sft.saving.run_record import RunRecord, read_record

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlace:
    """The place at which a run begins in its stream: `row`.

    `states` are known ones; `data` identifies the sources, and how rows are made of them.
    """

    row: int = 0
    states: tuple[StreamState, ...] = ()
    data: list[Any] = field(default_factory=list)


def find_place(checkpoint: Path | None, record: RunRecord, data: list[Any], *, is_main: bool) -> StreamPlace:
    """Return the place at which a run goes on from a checkpoint; the beginning without one. Any rank.

    Args:
        record: of this run.
        data: JSON-able values that identify the sources and their order.
        is_main: whether this rank logs a warning if the data is not the checkpoint's.
    """
    if checkpoint is None:
        return StreamPlace(data=data)
    state, then = read_trainer_state(checkpoint), read_record(checkpoint)
    step = state["global_step"] if then is None else step_of_same_sample(state["global_step"], then, record)
    callback = state.get("stateful_callbacks", {}).get(StreamPosition.__name__)
    saved = callback["attributes"] if isinstance(callback, dict) else {}
    if is_main and saved.get("data") != data:
        what = "is not the checkpoint's" if saved else "was not streamed in the checkpoint's run"
        logger.warning(
            "the training data %s: the run goes on at the same row, and the rows before it are skipped, though others were "
            "trained on", what,
        )  # fmt: skip
    states = saved.get("states", []) if saved.get("data") == data else []
    return StreamPlace(row=step * record.samples_a_step, states=tuple(map(StreamState.from_json, states)), data=data)


class StreamPosition(TrainerCallback, ExportableState):
    """Keep in each checkpoint the states of the stream from which it can go on, and end the stream with the run.

    Args:
        streamed: the `StreamedData`.
        rows_a_step: of all ranks.
        data: as in `StreamPlace`.
    """

    def __init__(self, streamed: Any, rows_a_step: int, data: list[Any]) -> None:
        self._streamed, self._rows_a_step, self._data, self._step = streamed, rows_a_step, data, 0

    def state(self) -> dict[str, Any]:
        """Return the states for the trainer state; the Trainer calls this when it saves a checkpoint."""
        states = self._streamed.rows.states_at(self._step * self._rows_a_step)
        return {"args": {}, "attributes": {"states": [state.to_json() for state in states], "data": self._data}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over the number of steps. The Trainer calls this before the first step, on every rank."""
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step. The Trainer calls this after each step, on every rank."""
        self._step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the making of rows. The Trainer calls this after the last step, on every rank."""
        self._streamed.close()
