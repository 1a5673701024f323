"""A signal to the launcher alone ends the run early, with a checkpoint, under each launcher; also if the save takes long."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests import small_job
from tests.launching import ROOT, Started, shimmed, torchrun
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.cluster.early_end import EXIT_STATUS

SLOW_SAVE = "tests.job.slow_save"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("launched"), 24)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(command, **env):
        started.append(Started(command, tmp_path / f"log{len(started)}", **env))
        return started[-1]

    yield begin
    for run in started:
        run.kill()


def launch_sh(ranks: int, *words: str, module: str = SLOW_SAVE) -> list[str]:
    variables = [f"ZERO_SFT_MODULE={module}", f"ZERO_SFT_PYTHON={sys.executable}"]
    return ["env", *variables, "PATH=" + os.environ["PATH"], str(ROOT / "launch.sh"), "--num_gpus", str(ranks), *words]


def words(folder: Path, out: Path) -> list[str]:
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": out, "logging_steps": 1,
        "per_device_train_batch_size": 2, "packing": False, "max_steps": 5000, "save_strategy": "no", "bf16": False,
        "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "name", "seconds"), [
    ("launch.sh", "SIGTERM", 40), ("launch.sh", "SIGUSR1", 0), ("launch.sh", "SIGHUP", 0), ("shim", "SIGTERM", 0),
    ("shim", "SIGUSR1", 0), ("torchrun", "SIGTERM", 0),
])  # fmt: skip
def test_one_checkpoint_and_a_status(folder, start, tmp_path, launcher, name, seconds):
    """DeepSpeed's own launcher would kill each rank after 30 seconds."""
    out = tmp_path / "out"
    given = words(folder, out)
    command = {
        "launch.sh": lambda: launch_sh(2, *given),
        "shim": lambda: [str(shimmed(tmp_path)), "--num_gpus", "2", "-m", SLOW_SAVE, *given],
        "torchrun": lambda: torchrun(2, *given, module=SLOW_SAVE),
    }[launcher]()
    run = start(command, SLOW_SAVE=str(seconds))
    run.wait_for(lambda: "step 3/5000" in run.output)
    run.process.send_signal(getattr(signal, name))
    status = run.wait(100)
    assert "Traceback" not in run.output or launcher == "torchrun", run.output[-3000:]
    assert status == (1 if launcher == "torchrun" else EXIT_STATUS), run.output[-3000:]
    require_one_whole_checkpoint(run, out)


@pytest.mark.slow
def test_the_second_signal_ends_it_at_once(folder, start, tmp_path):
    """While a checkpoint is being written, which takes 10 minutes here."""
    out = tmp_path / "out"
    run = start(launch_sh(2, *words(folder, out)), SLOW_SAVE="600")
    run.wait_for(lambda: "step 3/5000" in run.output)
    run.process.send_signal(signal.SIGTERM)
    run.wait_for(lambda: list(out.glob(".checkpoint-*.partial")))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(20) not in (0, EXIT_STATUS), run.output[-3000:]
    assert run.left_after(5) == []
    assert not list(out.glob("checkpoint-*"))
    assert run.output.count("error: ") == 1, run.output[-3000:]


def require_one_whole_checkpoint(run, out: Path) -> None:
    """Check that a run has ended early once, with a checkpoint, and has left no process."""
    assert run.output.count("ended early: ") == 1, run.output[-3000:]
    assert "error: " not in run.output, run.output[-3000:]
    (checkpoint,) = out.glob("checkpoint-*")
    assert find_damage(checkpoint, read_manifest(checkpoint), verify=True) is None
    assert run.left_after(10) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group(folder, start, tmp_path, name):
    """As `timeout` sends it, and a terminal at Ctrl-C: it counts once."""
    out = tmp_path / "out"
    run = start(launch_sh(2, *words(folder, out)), SLOW_SAVE="0")
    run.wait_for(lambda: "step 3/5000" in run.output)
    os.killpg(run.process.pid, getattr(signal, name))
    assert run.wait(60) == EXIT_STATUS, run.output[-3000:]
    require_one_whole_checkpoint(run, out)


@pytest.mark.slow
def test_workers_that_are_signalled_as_well(folder, start, tmp_path):
    """SLURM signals all processes of a task, with those that read data."""
    out = tmp_path / "out"
    options = ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"]
    run = start(launch_sh(2, *words(folder, out), *options), SLOW_SAVE="0")
    run.wait_for(lambda: "step 3/5000" in run.output)
    ranks = run.ranks(SLOW_SAVE)
    workers = [worker for rank in ranks.values() for worker in rank.children(recursive=True)]
    assert len(workers) >= 2
    for process in (*workers, *ranks.values()):
        process.send_signal(signal.SIGUSR1)
    assert run.wait(60) == EXIT_STATUS, run.output[-3000:]
    assert "Traceback" not in run.output, run.output[-3000:]
    assert len(list(out.glob("checkpoint-*"))) == 1
