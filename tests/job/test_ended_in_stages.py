"""A rank that is killed, hangs or gets a signal while it loads, evaluates, answers prompts, saves or exports."""

import time
from pathlib import Path

import pytest

from tests import small_job
from tests.errors import error_codes
from tests.job.test_ended_by_launchers import launch_sh
from tests.launching import Started
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.cluster.early_end import EXIT_STATUS

MODULE = "tests.job.with_fault"
STAGES = ("load", "evaluation", "answers", "save", "export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = small_job.make(tmp_path_factory.mktemp("stages"), 24)
    (folder / "prompts.json").write_text('["How many?"]')
    return folder


def ended(folder: Path, out: Path, fault: str, **options) -> tuple[int, str]:
    """Run the job with a fault; return its status and its output."""
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": out, "logging_steps": 1,
        "per_device_train_batch_size": 1, "packing": False, "max_steps": 6, "save_steps": 2, "bf16": False, "seed": 3,
        "eval_steps": 2, "eval_strategy": "steps", "eval_data_path": folder / "data.json", "sample_every": 2,
        "sample_prompts": folder / "prompts.json", "resume_from_checkpoint": "auto",
        "save_strategy": "no" if fault.endswith("export") else "steps", **options,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run = Started(launch_sh(2, *words, module=MODULE), out.parent / f"log{time.monotonic()}", FAULT=fault)
    try:
        status = run.wait(150)
        assert run.left_after(10) == [], run.output[-3000:]
    finally:
        run.kill()
    assert "Traceback" not in run.output, run.output[-5000:]
    return status, run.output


def require_whole(out: Path) -> int:
    """Check that each checkpoint is whole, and return their number."""
    checkpoints = list(out.glob("checkpoint-*"))
    assert all(find_damage(each, read_manifest(each), verify=True) is None for each in checkpoints)
    return len(checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed(folder, tmp_path, stage):
    """One message names the rank; the next start goes on, and ends well."""
    out = tmp_path / "out"
    status, output = ended(folder, out, f"kill:1:{stage}")
    assert status not in (0, EXIT_STATUS)
    assert error_codes(output) == ["cluster.rank_lost"], output[-3000:]
    assert "rank 1 (process " in output
    require_whole(out)
    status, output = ended(folder, out, "kill:9:load")
    assert status == 0, output[-3000:]
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["load", "save", "export", "answers"])
def test_stuck(folder, tmp_path, stage):
    """A rank that does nothing for 8 seconds says where it is."""
    out = tmp_path / "out"
    status, output = ended(folder, out, f"hang:1:{stage}", stage_timeout=8)
    assert status not in (0, EXIT_STATUS)
    assert error_codes(output) == ["cluster.stage_stuck"], output[-3000:]
    assert "has neither read nor written nor computed for 8 s while " in output
    if stage != "save":  # there, a thread writes, and the main thread waits for it
        assert "rank 1 on " in output
        assert "it is stuck in have (tests/job/with_fault.py, line " in output, output[-3000:]
    require_whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_signalled(folder, tmp_path, stage):
    """SIGTERM to one rank: during the load the run ends at once; later, at a step, with a checkpoint, or when it is done."""
    out = tmp_path / "out"
    status, output = ended(folder, out, f"term:1:{stage}")
    if stage == "load":
        assert status not in (0, EXIT_STATUS)
        assert error_codes(output) == ["cluster.ended_by_signal"], output[-3000:]
    elif stage == "export":
        assert status == 0, output[-3000:]
        assert (out / "model.safetensors").is_file()
    else:
        assert status == EXIT_STATUS, output[-3000:]
        assert error_codes(output) == ["cluster.ended_early"], output[-3000:]
        assert require_whole(out) >= 1
