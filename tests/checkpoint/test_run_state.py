"""The JSON files of a checkpoint: what would end a run later, in a traceback, is found when they are read."""

import json

import pytest

from tests.errors import raises
from zero_sft.checkpoint.run_state import TRAINER_STATE_FILE, TRAINING_STATE_FILE, read_trainer_state, read_training_state

TRAINER = {
    "global_step": 7,
    "log_history": [{"step": 1, "loss": 2.5}],
    "best_metric": None,
    "epoch": 1,
    "is_world_process_zero": True,
}
ENGINE = {"counters": {"global_steps": 7}, "loss_scaler": {"cur_scale": 65536.0, "raise_error": False}, "groups": [{"step": 7}]}


def test_read_back(tmp_path):
    (tmp_path / TRAINER_STATE_FILE).write_text(json.dumps(TRAINER | {"log_history": [{"step": 1, "loss": float("nan")}]}))
    assert str(read_trainer_state(tmp_path).get("log_history")) == "[{'step': 1, 'loss': nan}]"
    (tmp_path / TRAINING_STATE_FILE).write_text(json.dumps({"schedule": {"last_epoch": 7}, "engine": ENGINE}))
    assert read_training_state(tmp_path) == {"schedule": {"last_epoch": 7}, "engine": ENGINE}


@pytest.mark.parametrize("values", [
    {"global_step": "7"}, {"global_step": -1}, {"global_step": 2**70}, {"global_step": True}, {"log_history": {}},
    {"log_history": [[]]}, {"log_history": [{"loss": 1}]}, {"best_model_checkpoint": 5}, {"epoch": "x"},
    {"stateful_callbacks": []}, {"total_flos": "many"},
])  # fmt: skip
def test_hostile_trainer_states(tmp_path, values):
    (tmp_path / TRAINER_STATE_FILE).write_text(json.dumps(TRAINER | values))
    with raises("resume.bad_trainer_state", TRAINER_STATE_FILE, next(iter(values))):
        read_trainer_state(tmp_path)


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"schedule": {}}', '{"schedule": [], "engine": {}}', "[" * 100_000, "\ud800".encode("utf-8", "replace"),
    json.dumps({"schedule": {}, "engine": ENGINE | {"counters": {"global_steps": "x"}}}),
    json.dumps({"schedule": {}, "engine": ENGINE | {"groups": [{"step": []}]}}),
    json.dumps({"schedule": {}, "engine": ENGINE | {"loss_scaler": {"cur_scale": None}}}),
])  # fmt: skip
def test_hostile_training_states(tmp_path, text):
    path = tmp_path / TRAINING_STATE_FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises("resume.bad_training_state", TRAINING_STATE_FILE):
        read_training_state(tmp_path)
    path.unlink()
    with raises("resume.file_missing", TRAINING_STATE_FILE):
        read_training_state(tmp_path)
