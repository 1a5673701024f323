"""Disks that are full, read-only or gone: one clear error each, and the checkpoints that were there stay whole."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import small_job
from tests.errors import error_codes
from tests.saving.test_placing import unshared


def trained(folder: Path, kind: str, samples: int = 24) -> str:
    small_job.make(folder, samples)
    done = unshared(sys.executable, "-m", "tests.faults.disks", kind, folder, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left []" in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("kind", "reason", "program"), [
    ("full", "No space left", None), ("readonly", "Read-only file system", "mkfs.ext4"),
    ("quota", "Disk quota exceeded", "mkfs.btrfs"),
])  # fmt: skip
def test_a_disk_that_takes_no_more(tmp_path, kind, reason, program):
    """Checkpoints can't be written, and the run goes on. The model is written elsewhere, and one error says where."""
    if program and not shutil.which(program):
        pytest.skip(f"needs {program}")
    output = trained(tmp_path, kind)
    for step in (4, 6, 8):
        assert output.count(f"no checkpoint is saved at step {step}: ") == 1, output[-4000:]
    assert "step 8/8" in output
    assert "status 1" in output
    assert output.count("error: ") == 1, output[-3000:]
    assert error_codes(output)[-1].startswith("export."), error_codes(output)
    assert reason in output
    assert "Traceback" not in output
    (rescued,) = tmp_path.glob("out-rescued-*")
    assert f"The trained model is complete in {rescued}." in output
    assert (rescued / "model.safetensors").is_file()
    assert output.endswith("checkpoint-2 damage None\n"), output[-300:]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_mount_that_vanishes(tmp_path):
    """No checkpoint fills the disk below it. The model is written there in the end, since it would be lost otherwise."""
    output = trained(tmp_path, "vanished")
    assert "no checkpoint is saved at step 4: " in output
    assert "its mount on" in output
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "status 0" in output, output[-2000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cache_without_room(tmp_path):
    small_job.make(tmp_path, 2)
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "word " * 1000}]
    rows = [{"conversations": talk} for _ in range(400)]
    make = small_job.make
    try:
        small_job.make = lambda folder, samples: (folder / "data.json").write_text(json.dumps(rows))  # type: ignore[assignment]
        output = trained(tmp_path, "cache")
    finally:
        small_job.make = make
    assert "status 1" in output
    assert output.count("error: ") == 1, output[-3000:]
    assert error_codes(output)[-1].startswith("data."), error_codes(output)
    assert "No space left" in output
    assert "Traceback" not in output
