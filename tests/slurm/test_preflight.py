"""The preflight on a real cluster, and its checks one by one."""

import re
import time
from pathlib import Path

import pytest

from tests.errors import error_codes
from tests.launching import ROOT
from tests.slurm.job import submit, words

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(300)]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


def preflight(cluster, folder: Path, arguments: list[str], *sbatch: str, **env: str) -> tuple[dict[str, str], str, float]:
    """Return what SLURM says of the job, its log, and the seconds that it took."""
    began = time.monotonic()
    number = submit(cluster, folder / "log", ["--preflight", *arguments], *TWO_NODES, *sbatch, **env)
    ended = cluster.wait(number, seconds=120)
    return ended, (folder / "log").read_text(), time.monotonic() - began


def test_nothing_is_wrong(cluster, job, tmp_path):
    ended, text, _ = preflight(cluster, tmp_path, words(job, tmp_path / "out"))
    assert ended["JobState"] == "COMPLETED", text
    assert "4 ranks on 2 nodes: node1, node2" in text
    assert "nothing would hinder a run" in text
    assert "a number summed on 4 ranks" in text
    assert "FAILED" not in text
    assert not list(tmp_path.glob(".zero_sft-preflight-*"))


def test_a_node_without_the_model(cluster, job, tmp_path):
    """The model is on the first node's own disk."""
    cluster.run("cp", "-rT", job / "model", "/local/model", on="node1")
    arguments = words(job, tmp_path / "out", model_name_or_path="/local/model")
    ended, text, _ = preflight(cluster, tmp_path, arguments)
    assert ended["JobState"] == "FAILED", text
    (line,) = [line for line in text.splitlines() if re.match(r"\d:   model  ", line)]
    assert "FAILED" in line
    assert "node2: /local/model/config.json: No such file or directory" in line
    assert "copy it to every node" in text
    assert "a run would fail" in text
    cluster.run("rm", "-r", "/local/model", on="node1")


def test_an_output_that_is_not_shared(cluster, job, tmp_path):
    ended, text, _ = preflight(cluster, tmp_path, words(job, "/local/out"))
    assert ended["JobState"] == "FAILED", text
    assert "node2: another file system than that of rank 0" in text
    assert "--save_on_each_node True" in text
    ended, text, _ = preflight(cluster, tmp_path, words(job, "/local/out", save_on_each_node=True, save_strategy="steps"))
    assert ended["JobState"] == "COMPLETED", text


def wrapped(cluster, folder: Path, job: Path, line: str) -> tuple[dict[str, str], str, float]:
    """Run the preflight with a line of shell before each rank's program."""
    wrapper = folder / "wrapper"
    wrapper.write_text(f'#!/bin/bash\n{line}\nexec "$@"\n')
    wrapper.chmod(0o755)
    python = str(ROOT / ".venv" / "bin" / "python")
    return preflight(cluster, folder, words(job, folder / "out"), CONTAINER=str(wrapper), ZERO_SFT_PYTHON=python)


def test_nodes_with_other_variables(cluster, job, tmp_path):
    """A variable that only the first node's environment sets; the ranks' start is changed by a wrapper."""
    ended, text, _ = wrapped(cluster, tmp_path, job, "[[ $(hostname) != node1 ]] || export NCCL_IB_HCA=mlx5_0")
    assert ended["JobState"] == "COMPLETED", text
    (line,) = [line for line in text.splitlines() if "network variables" in line]
    assert "WARNING" in line
    assert "NCCL_IB_HCA: mlx5_0 on node1; none on node2" in line


def test_a_rank_that_does_not_come(cluster, job, tmp_path):
    """It hangs before it has joined, as a process on a sick node does."""
    ended, text, seconds = wrapped(
        cluster, tmp_path, job, "export ZERO_SFT_PREFLIGHT_SECONDS=15; [[ ${RANK:-} != 3 ]] || exec sleep 200"
    )
    assert ended["JobState"] == "FAILED", text
    assert "preflight.ranks_missing" in error_codes(text)
    assert "rank 3 on node2" in text
    assert seconds < 60


@pytest.mark.parametrize("what", ["model without tokenizer", "model"])
def test_model_folders_that_are_not_shared(cluster, job, tmp_path, what):
    """Each node has its own copy of the model; the tokenizer reaches the second node from the first."""
    for node in cluster.nodes:
        cluster.run("cp", "-rT", job / "model", "/local/model", on=node)
    if what == "model without tokenizer":
        cluster.run("bash", "-c", "rm /local/model/*token* /local/model/*.jinja", on="node2")
    number = submit(
        cluster, tmp_path / "log", words(job, tmp_path / "out", model_name_or_path="/local/model"), *TWO_NODES
    )  # fmt: skip
    ended = cluster.wait(number)
    assert ended["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for node in cluster.nodes:
        cluster.run("rm", "-r", "/local/model", on=node)


def test_an_output_on_each_node(cluster, job, tmp_path):
    """Folders that the nodes don't share: each node keeps its ranks' part of the checkpoints, and rank 0 writes the model."""
    arguments = words(job, "/local/out", save_on_each_node=True, save_strategy="steps", save_steps=2)
    number = submit(cluster, tmp_path / "log", arguments, *TWO_NODES)
    ended = cluster.wait(number)
    text = (tmp_path / "log").read_text()
    assert ended["JobState"] == "COMPLETED", text
    assert "checkpoint-4" in cluster.run("ls", "/local/out", on="node1")
    assert "checkpoint-4" in cluster.run("ls", "/local/out", on="node2")
    assert "model.safetensors" in cluster.run("ls", "/local/out", on="node1")
    for node in cluster.nodes:
        cluster.run("rm", "-r", "/local/out", on=node)
