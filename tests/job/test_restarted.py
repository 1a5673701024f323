"""`launch.sh --max_restarts` with ranks that really die."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import small_job
from tests.errors import error_codes
from tests.launching import ROOT, Started


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("restarted"), 24)


def launched(folder: Path, out: Path, log: Path, launcher_options=(), **options) -> tuple[int, str]:
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": out, "logging_steps": 1,
        "per_device_train_batch_size": 1, "packing": False, "max_steps": 8, "save_steps": 2, "bf16": False, "seed": 3,
        "learning_rate": 0.001, "save_async": False, **options,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    env = ["env", f"ZERO_SFT_PYTHON={sys.executable}", f"PATH={os.environ['PATH']}"]
    run = Started([*env, str(ROOT / "launch.sh"), "--num_gpus", "2", *launcher_options, *words], log)
    try:
        status = run.wait(400)
        assert run.left_after(10) == [], run.output[-3000:]
    finally:
        run.kill()
    return status, run.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_ends_as_if_nothing_had_been(folder, tmp_path):
    """Rank 1 is killed in step 6, and rank 0 in step 8 of the second start. Weights and losses are those of a whole run."""
    status, _ = launched(folder, tmp_path / "whole", tmp_path / "log0")
    assert status == 0
    faults = "kill:rank=1,step=6; kill:rank=0,step=8,start=2"
    (tmp_path / "killed" / "checkpoint-1").mkdir(parents=True)
    status, output = launched(
        folder, tmp_path / "killed", tmp_path / "log1", ["--max_restarts", "3"], simulate_fault=faults,
        overwrite_output_dir=True,
    )  # fmt: skip
    assert status == 0, output[-3000:]
    assert "the run has ended in step 6: restart 1 of 3, from checkpoint-4 (status" in output
    assert "the run has ended in step 8: restart 2 of 3, from checkpoint-6 (status" in output
    assert error_codes(output) == ["cluster.rank_lost"] * 2
    whole, killed = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    histories = [json.loads((tmp_path / out / "logs" / "history.json").read_text()) for out in ("whole", "killed")]
    first, second = ([(entry["step"], entry["loss"]) for entry in each if "loss" in entry] for each in histories)
    assert first == second


@pytest.mark.slow
def test_a_crash_loop_is_left(folder, tmp_path):
    """It dies in step 5 of each start; the samples of that step are named."""
    status, output = launched(
        folder, tmp_path / "loop", tmp_path / "log", ["--max_restarts=5"], simulate_fault="kill:rank=1,step=5,start=0"
    )
    assert status not in (0, 75)
    assert output.count("restart 1 of 5") == 1
    assert "restart 2" not in output
    assert "the run has ended twice in step 5, so it is not started again. The samples of this step: " in output
    assert output.count("data.json, sample ") >= 2
    assert sorted(path.name for path in (tmp_path / "loop").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_an_error_of_the_input_is_not_tried_again(folder, tmp_path):
    status, output = launched(folder, tmp_path / "bad", tmp_path / "log", ["--max_restarts", "3"], learning_rat=1)
    assert status == 1
    assert error_codes(output)[0] == "arguments.unknown"
    assert "launch.sh: the run is not started again: arguments.unknown would not change" in output
