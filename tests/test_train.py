"""Tests of `zero_sft.train`: the loss curve that the job names is this run's. `scenarios/test_train.py` runs whole jobs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from zero_sft import train

NO_LOSS = {"history": [{"step": 1, "train_runtime": 1.0}], "answers": []}
LOSS = {"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "answers": []}


def inputs_with_earlier_curve(folder: Path) -> Any:
    """Inputs of a run in a folder that holds an earlier run's loss curve."""
    (folder / "logs").mkdir()
    (folder / "logs" / "loss.png").write_bytes(b"earlier")
    return SimpleNamespace(
        log_folder=folder / "logs",
        model_source=SimpleNamespace(name="m"),
        arguments=SimpleNamespace(load_best_model_at_end=False),
    )


def test_an_earlier_runs_loss_curve_does_not_stay(tmp_path):
    inputs = inputs_with_earlier_curve(tmp_path)
    assert train._write_log_files(inputs, NO_LOSS).startswith("none: no loss was logged")
    assert not (tmp_path / "logs" / "loss.png").exists()
    assert train._write_log_files(inputs, LOSS) == str(tmp_path / "logs" / "loss.png")
    assert (tmp_path / "logs" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_curve_that_is_not_written_is_not_named(tmp_path, caplog):
    inputs = inputs_with_earlier_curve(tmp_path)
    with mock.patch("zero_sft.job.loss_plot.save_figure", side_effect=OSError("disk full")), caplog.at_level("INFO"):
        curve = train._write_log_files(inputs, LOSS)
        train._log_results(inputs, LOSS, curve, None)
    assert "disk full" in caplog.text
    assert "loss curve: none: it could not be written" in caplog.text
    assert not (tmp_path / "logs" / "loss.png").exists()
