"""The two JSON files of a checkpoint that hold a run's state, checked before a run takes it over.

`trainer_state.json` is the Trainer's: its step and its log. `training_state.json` has the learning-rate schedule, and the
engine's counters, loss scaler and optimizer groups.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pydantic
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from zero_sft.errors import CheckpointError

TRAINER_STATE_FILE = "trainer_state.json"
TRAINING_STATE_FILE = "training_state.json"

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
_Numbers = dict[str, bool | int | float]


class _LogEntry(TypedDict):
    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    step: _Count


class TrainerState(TypedDict):
    """The fields of the Trainer's state that this project reads, or that would end a run later if they had other types."""

    global_step: _Count
    log_history: NotRequired[list[_LogEntry]]
    epoch: NotRequired[float | None]
    total_flos: NotRequired[float]
    best_metric: NotRequired[float | None]
    best_global_step: NotRequired[_Count | None]
    best_model_checkpoint: NotRequired[str | None]
    stateful_callbacks: NotRequired[dict[str, dict[str, Any] | list[dict[str, Any]]]]


class EngineState(TypedDict):
    """The state of a DeepSpeed engine apart from tensors; `zero/engine_state.py` reads and restores it."""

    counters: Mapping[str, _Count]
    loss_scaler: _Numbers
    groups: list[_Numbers]


class TrainingState(TypedDict):
    """The contents of `training_state.json`."""

    schedule: dict[str, Any]
    engine: EngineState


_TRAINER_STATE = pydantic.TypeAdapter(TrainerState)
_TRAINING_STATE = pydantic.TypeAdapter(TrainingState)


def read_trainer_state(folder: Path) -> TrainerState:
    """Read `trainer_state.json`. Unknown fields are left out.

    Raises:
        CheckpointError: it can't be read, or a field has another type.
    """
    return _read(_TRAINER_STATE, folder / TRAINER_STATE_FILE, "resume.bad_trainer_state")


def read_training_state(folder: Path) -> TrainingState:
    """Read `training_state.json`.

    Raises:
        CheckpointError: it can't be read, or a field has another type.
    """
    return _read(_TRAINING_STATE, folder / TRAINING_STATE_FILE, "resume.bad_training_state")


def _read(adapter: pydantic.TypeAdapter[Any], path: Path, code: str) -> Any:
    try:
        return adapter.validate_json(path.read_bytes(), strict=True)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise CheckpointError(f"{path} can't be used: {place}: {fault['msg']}"[:300], code=code) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", code="resume.file_missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}", code=code) from error
