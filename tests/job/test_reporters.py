"""`--report_to`: TensorBoard and wandb (offline) get the metrics once, from rank 0, and no secret."""

import json
from pathlib import Path

import pytest

from tests import small_job
from tests.launching import Started, torchrun

SECRET = "hf_ThisMustNotBeInAnyFile"


@pytest.mark.slow
def test_tensorboard_and_wandb(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_job.make(tmp_path, 24)
    out = tmp_path / "out"
    given = {
        "model_name_or_path": tmp_path / "model", "data_path": tmp_path / "data.json", "output_dir": out, "logging_steps": 2,
        "per_device_train_batch_size": 2, "max_steps": 6, "bf16": False, "packing": False,
        "eval_data_path": tmp_path / "data.json", "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run = Started(
        torchrun(2, *words, "--report_to", "tensorboard", "wandb"), tmp_path / "log",
        WANDB_MODE="offline", WANDB_DIR=str(tmp_path), HF_TOKEN=SECRET,
    )  # fmt: skip
    try:
        assert run.wait(200) == 0, run.output[-3000:]
        assert run.left_after(10) == []
    finally:
        run.kill()
    history = [entry for entry in json.loads((out / "logs" / "history.json").read_text()) if "loss" in entry]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent))
    scalars.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in scalars.Scalars("train/loss")]
    assert losses == [(entry["step"], entry["loss"]) for entry in history]
    assert [event.step for event in scalars.Scalars("eval/loss")] == [3, 6]
    assert [event.step for event in scalars.Scalars("train/trained_share")] == [2, 4, 6]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    holders = [path for path in tmp_path.rglob("*") if _holds(path, SECRET)]
    assert holders == []


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()
