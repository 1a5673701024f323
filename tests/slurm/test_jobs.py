"""`sbatch launch.sh` on a real SLURM: jobs that end, and jobs that come back."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.errors import error_codes
from tests.slurm.cluster import Cluster
from tests.slurm.job import losses, submit, words
from zero_sft.checkpoint.manifest import find_damage, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")

LONG = {"max_steps": 16, "save_strategy": "steps", "save_steps": 4, "simulate_fault": "slow:rank=0,step=1,start=0,seconds=1"}
"""A run that takes a quarter of a minute, since a rank waits a second in each step."""

UNDISTURBED = {**LONG, "simulate_fault": "slow:rank=0,step=99"}
"""The same run without waiting."""


@pytest.fixture(scope="module")
def one_node(cluster, job, tmp_path_factory) -> Path:
    """The output of four ranks on one node, in as many steps as `whole`."""
    folder = tmp_path_factory.mktemp("one_node")
    number = submit(cluster, folder / "log", words(job, folder / "out", **UNDISTURBED), "--ntasks-per-node=4")
    assert cluster.wait(number)["JobState"] == "COMPLETED", (folder / "log").read_text()
    return folder / "out"


@pytest.fixture(scope="module")
def whole(cluster, job, tmp_path_factory) -> Path:
    """The output of a run of `LONG`'s steps that nothing has interrupted, on four ranks."""
    folder = tmp_path_factory.mktemp("whole")
    number = submit(cluster, folder / "log", words(job, folder / "out", **UNDISTURBED), *TWO_BY_TWO)
    ended = cluster.wait(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), (folder / "log").read_text()
    return folder / "out"


def same_weights(one: Path, two: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for_step(cluster, log: Path, step: int, seconds: float = 90) -> None:
    cluster.until(lambda: f"step {step}/" in log.read_text(), f"step {step} has not come", seconds)


def test_two_nodes_train_as_one(whole, one_node):
    """The same seed gives the same losses and weights as four ranks on one node; plain transformers opens the export."""
    assert "0:    " in (whole.parent / "log").read_text(), "each line has its rank"
    assert len(losses(whole)) == LONG["max_steps"]
    assert losses(whole) == losses(one_node)
    assert same_weights(whole, one_node)
    opened = AutoModelForCausalLM.from_pretrained(whole)
    assert opened.config.use_cache is True


def test_a_time_limit(cluster, job, whole, tmp_path):
    """The job is signalled before its minute is over, saves, queues itself again, and ends as if nothing had been."""
    log, out = tmp_path / "log", tmp_path / "out"
    longer = {**LONG, "simulate_fault": "slow:rank=0,step=1,start=0,seconds=4"}
    number = submit(cluster, log, words(job, out, **longer), *TWO_BY_TWO, "--time=2", "--signal=B:USR1@50")
    cluster.until(lambda: "queued again" in log.read_text(), "the job was not queued again", 150)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=10")  # one signal is enough
    ended = cluster.wait(number, seconds=240)
    text = log.read_text()
    assert ended["JobState"] == "COMPLETED", text[-5000:]
    assert int(ended["Restarts"]) >= 1, text[-5000:]
    assert "the run ends early, on SIGUSR1 on " in text
    assert "launch.sh: queued again, 1 of at most 20 times" in text
    assert f"launch.sh: start 2 of job {number}" in text
    assert set(error_codes(text)) <= {"cluster.ended_early"}, text[-5000:]
    assert losses(out) == losses(whole)
    assert same_weights(out, whole)


def test_a_preemption(cluster, job, whole, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    number = submit(cluster, log, words(job, out, **LONG), *TWO_BY_TWO)
    wait_for_step(cluster, log, 3)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null", "--wrap", "sleep 3"
    )  # fmt: skip
    assert cluster.wait(urgent, seconds=60)["JobState"] == "COMPLETED"
    ended = cluster.wait(number)
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text[-5000:]
    assert "the run ends early, on " in text
    assert losses(out) == losses(whole)
    assert same_weights(out, whole)


def test_a_node_that_crashes(cluster, job, tmp_path):
    """The job goes on with the node that is left, from the newest checkpoint."""
    log, out = tmp_path / "log", tmp_path / "out"
    number = submit(cluster, log, words(job, out, **LONG), "--nodes=1-2", "--gpus-per-node=2", "--cpus-per-task=2")
    wait_for_step(cluster, log, 6)
    assert "starting 4 ranks" in log.read_text(), "one for each GPU of the two nodes"
    cluster.kill_node("node2")
    try:
        ended = cluster.wait(number, seconds=200)
        text = log.read_text()
        assert (ended["JobState"], ended["NodeList"]) == ("COMPLETED", "node1"), text[-5000:]
        assert int(ended["Restarts"]) >= 1
        assert "starting 2 ranks" in text
        assert [step for step, _ in losses(out)][-1] == LONG["max_steps"]
        for checkpoint in out.glob("checkpoint-*"):
            assert find_damage(checkpoint, read_manifest(checkpoint), verify=True) is None
    finally:
        cluster.start_node("node2")


def test_bad_data_fails_once(cluster, job, tmp_path):
    """It is not queued again: a further start would not change it."""
    (tmp_path / "bad.json").write_text('[{"conversations": [{"from": "human"}]}]')
    log = tmp_path / "log"
    number = submit(cluster, log, words(job, tmp_path / "out", data_path=tmp_path / "bad.json"), *TWO_BY_TWO)
    ended = cluster.wait(number, seconds=60)
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text
    assert len(re.findall(r"^\d: error: ", text, re.MULTILINE)) == 1, text
    assert next(code for code in error_codes(text) if code).startswith("data."), text


def test_a_rank_that_is_killed_fails_the_job(cluster, job, tmp_path):
    log = tmp_path / "log"
    arguments = words(job, tmp_path / "out", **{**LONG, "simulate_fault": "slow:rank=0,step=1,seconds=1; kill:rank=3,step=8"})
    number = submit(cluster, log, arguments, *TWO_BY_TWO)
    wait_for_step(cluster, log, 7)
    ended = cluster.wait(number, seconds=30)
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_a_killed_rank_is_started_again_in_place(cluster, job, tmp_path):
    log = tmp_path / "log"
    arguments = [
        "--max_restarts",
        "1",
        *words(
            job,
            tmp_path / "out",
            **{**LONG, "max_steps": 8, "simulate_fault": "slow:rank=0,step=1,seconds=1; kill:rank=3,step=7"},
        ),
    ]
    number = submit(cluster, log, arguments, *TWO_BY_TWO)
    ended = cluster.wait(number, seconds=120)
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), text[-4000:]
    assert "the run has ended in step 7: restart 1 of 1, from checkpoint-4" in text


def test_cancelled_jobs_stay_cancelled(cluster, job, tmp_path):
    """They save a checkpoint first: SLURM's SIGTERM and the signal that launch.sh passes on are one request."""
    log = tmp_path / "log"
    number = submit(cluster, log, words(job, tmp_path / "out", **LONG), *TWO_BY_TWO)
    wait_for_step(cluster, log, 2)
    cluster.run("scancel", number)
    ended = cluster.wait(number, seconds=60)
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), text
    saved = list((tmp_path / "out").glob("checkpoint-*"))
    assert saved, text
    assert find_damage(saved[0], read_manifest(saved[0]), verify=True) is None


def test_a_folder_with_spaces_and_hard_words(cluster, job, tmp_path):
    """Submitted from elsewhere, through a link, to a project without an environment, with words that a shell would change."""
    folder = tmp_path / "a folder; $HOME"
    folder.mkdir()
    name = "two  words $HOME; *\"'{a,b}"
    arguments = words(job, folder / "out put", run_name=name)
    number = submit(cluster, folder / "log", arguments, "--nodes=2", "--ntasks-per-node=1", cwd=folder)
    ended = cluster.wait(number)
    assert ended["JobState"] == "COMPLETED", (folder / "log").read_text()
    recorded = json.loads((folder / "out put" / "logs" / "arguments.json").read_text())
    assert recorded["run_name"] == name


def test_a_cluster_that_is_laid_out_otherwise(needs_slurm, job, tmp_path):
    """Three nodes with odd names and one GPU each, of which SLURM hands out the devices; the ranks compute on CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder, ("gpu-07", "gpu-08", "c3"), cpus=2, gpus=1, network="10.89.0") as cluster:
            shape = ("--nodes=3", "--gpus-per-node=1", "--cpus-per-task=2")
            number = submit(cluster, tmp_path / "log", words(job, tmp_path / "out"), *shape)
            ended = cluster.wait(number)
            assert ended["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
            assert "starting 3 ranks" in (tmp_path / "log").read_text()
            assert len(losses(tmp_path / "out")) == 4
    finally:
        shutil.rmtree(folder, ignore_errors=True)
