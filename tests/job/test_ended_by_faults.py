"""`--simulate_fault`, under a real launcher: each fault has the end that docs/recovery.md promises."""

import time
from pathlib import Path

import pytest

from tests import small_job
from tests.errors import error_codes
from tests.job.test_restarted import launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("faults"), 24)


def ended(folder: Path, tmp_path: Path, fault: str, **options) -> tuple[int, str, Path]:
    out = tmp_path / "out"
    status, output = launched(folder, out, tmp_path / "log", simulate_fault=fault, **options)
    assert "Traceback" not in output or fault.startswith("oom"), output[-3000:]
    return status, output, out


@pytest.mark.slow
def test_hang(folder, tmp_path):
    """Eight seconds after it has begun to hang, all ranks have written their stacks."""
    began = time.monotonic()
    status, output, out = ended(folder, tmp_path, "hang:rank=1,step=5", step_timeout=8)
    assert status not in (0, 75)
    assert time.monotonic() - began < 90
    assert error_codes(output) == ["cluster.stuck"], output[-3000:]
    assert "step 5 has taken more than 8 s" in output
    assert "rank 1 is in _have (zero_sft/job/simulated_faults.py, line" in output
    stacks = [(out / "logs" / f"stacks_rank_{rank}.txt").read_text() for rank in range(2)]
    assert "simulated_faults.py" in stacks[1]
    assert "simulated_faults.py" not in stacks[0]
    assert "[cluster.stuck]" in (out / "logs" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code"), [("oom:rank=1,step=3", "cluster.device_memory"), ("kill:rank=0,step=3", "cluster.rank_lost")]
)
def test_a_rank_that_fails(folder, tmp_path, fault, code):
    status, output, out = ended(folder, tmp_path, fault)
    assert status not in (0, 75)
    assert error_codes(output) == [code], output[-3000:]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_preempt(folder, tmp_path):
    status, output, out = ended(folder, tmp_path, "preempt:rank=1,step=3", max_steps=500)
    assert status == 75, output[-3000:]
    assert output.count("ended early: ") == 1
    assert error_codes(output) == ["cluster.ended_early"]
    assert len(list(out.glob("checkpoint-*"))) == 2


@pytest.mark.slow
def test_disk_full_and_slow(folder, tmp_path):
    """Two faults: the run goes on, and ends well."""
    status, output, out = ended(folder, tmp_path, "disk_full:rank=1,step=3; slow:rank=0,step=7,seconds=1")
    assert status == 0, output[-3000:]
    assert "no checkpoint is saved at step 4: " in output
    assert "No space left on device (--simulate_fault)" in output
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "model.safetensors").is_file()
