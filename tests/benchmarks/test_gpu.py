"""`benchmarks.gpu`, in a dry run on the CPU: a slip in it would cost the time on a machine that is there for minutes."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import environment, wheels
from benchmarks.gpu.document import document
from benchmarks.gpu.isolation import Outcome, run_part
from benchmarks.gpu.parts import parts
from benchmarks.gpu.settings import Settings
from tests.slow import slow

ON_A_CPU = ("machine", "checkpoint", "tests", "load", "train-sdpa", "train-trl", "memory")


@pytest.fixture(scope="module")
def operators():
    """The operator of DeepSpeed that every CPU rank loads, and no GPU, compiled before the parts' own time."""
    from testing.operators import compile_all
    from testing.runner import context

    compile_all(context, ("ShareMemCommBuilder",))


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path, operators):
    page = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry_run", "--write", str(page), "--work", str(tmp_path / "work")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=850, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    text, raw = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert run.returncode == 0, text
    assert {name: each["status"] for name, each in raw.items() if name in ON_A_CPU} == dict.fromkeys(ON_A_CPU, "done")
    assert raw.keys() == {part.name for part in parts(Settings(work=str(tmp_path)))}
    ours, theirs = (raw[name]["result"]["losses"] for name in ("train-sdpa", "train-trl"))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-3)
    for heading in ("Parts", "Machine", "Tests", "Load", "Training", "Memory"):
        assert f"\n## {heading}\n" in text
    assert "What failed" not in text


PRINTS_AND = "import json, os, sys, time; print('the last words', flush=True); "
KEEPS = "from benchmarks.gpu.settings import keep; keep('part', {'found': 1}); "


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(0)", "done"), ("sys.exit(3)", "failed"), ("1 / 0", "failed"), slow("time.sleep(60)", "out of time"),
     slow("os.fork() and time.sleep(60) or time.sleep(60)", "out of time")],
)  # fmt: skip
def test_a_part_ends_in_its_time_and_what_it_has_kept_is_there(tmp_path, code, status):
    started = time.monotonic()
    outcome = run_part("part", [sys.executable, "-c", PRINTS_AND + KEEPS + code], 6, tmp_path)
    assert outcome.status == status
    assert time.monotonic() - started < 20
    assert outcome.result == {"found": 1}
    assert ("the last words" in outcome.tail) == (status != "done")


def test_no_time_left_is_skipped(tmp_path):
    assert run_part("part", [sys.executable, "-c", "1 / 0"], 0.5, tmp_path).status == "skipped"


def test_the_page_says_what_failed(tmp_path):
    failed = Outcome(name="load", status="failed", seconds=3, limit_s=9, result={}, tail="exit status 1\nout of memory")
    text = document(Settings(work=str(tmp_path)), {"load": failed})
    assert "### load: failed after 3 s\n\n```\nexit status 1\nout of memory\n```" in text


def test_every_wheel_is_of_a_tested_version():
    pinned = wheels.pins(Path("constraints.txt"))
    assert not [name for name in wheels.PACKAGES if name.lower().replace("_", "-") not in pinned]


def test_wheels_are_unpacked_where_there_is_no_pip(tmp_path):
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "thing/__init__.py",
            "thing-1.dist-info/METADATA",
            "thing-1.data/scripts/run",
            "thing-1.data/purelib/other.py",
        ):
            archive.writestr(name, "x = 1\n")
    environment.unpack(wheel, tmp_path / "site", tmp_path / "bin")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found >= {"site/thing/__init__.py", "site/thing-1.dist-info/METADATA", "bin/run", "site/other.py"}
    assert os.access(tmp_path / "bin" / "run", os.X_OK)
