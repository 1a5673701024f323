"""Runs on nodes that share no output folder (`--save_on_each_node`), next to a run whose ranks share one.

A node is a working directory here, in which its ranks' `--output_dir runs/NAME` is.
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from testing.runner import run_ranks
from tests import small_job
from tests.errors import error_codes
from tests.saving.test_sharded_checkpoints import OPTIONS, equal, log, weights
from tests.slow import slow, slow_except
from zero_sft.checkpoint.manifest import read_manifest
from zero_sft.commands.checkpoints import main as list_checkpoints
from zero_sft.commands.export import main as export
from zero_sft.train import main as train

RANKS = 3
NODES = (0, 0, 1)
"""The node of each rank."""


def job(folder, nodes, arguments):
    from zero_sft.cluster import node_layout

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(nodes[:rank].count(nodes[rank]))
    node = folder / f"node{nodes[rank]}"
    node.mkdir(exist_ok=True)
    os.chdir(node)
    node_layout._host_identity = lambda: node.name
    node_layout.socket.gethostname = lambda: node.name
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "learning_rate": 0.001, "bf16": False,
        "seed": 3, "logging_steps": 1, **OPTIONS, **arguments,
    }  # fmt: skip
    assert train([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 0


def run(folder: Path, out: str, nodes=NODES, **arguments) -> Path:
    """Run the job, and return the output folder on the first node."""
    given = {"output_dir": f"runs/{out}", "save_on_each_node": True, **arguments}
    run_ranks(len(nodes), job, {"folder": folder, "nodes": nodes, "arguments": given}, 400)
    return folder / "node0" / "runs" / out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("nodes"), 24)


@pytest.fixture(scope="module")
def shared(folder) -> Path:
    """Six steps; all ranks see one folder."""
    return run(folder, "shared", output_dir=folder / "shared", save_on_each_node=True) and folder / "shared"


@pytest.fixture(scope="module")
def apart(folder) -> Path:
    """The same six steps; each node has its own folder."""
    return run(folder, "apart")


def merge(folder: Path, name: str, target: Path) -> Path:
    """Copy the folders of a checkpoint of both nodes into one."""
    for node in ("node0", "node1"):
        shutil.copytree(folder / node / "runs" / name, target, dirs_exist_ok=True)
    return target


@pytest.mark.slow
def test_nodes_that_share_the_folder_make_an_ordinary_checkpoint(shared):
    assert read_manifest(shared / "checkpoint-6").hosts == {}
    assert equal(shared / "checkpoint-6", shared)


def test_each_node_has_its_ranks_files(folder, shared, apart):
    other = folder / "node1" / "runs" / "apart"
    ranks = [f"optimizer-{rank + 1:05d}-of-00003.safetensors" for rank in range(RANKS)]
    names = {node: {path.name for path in (node / "checkpoint-4").iterdir()} for node in (apart, other)}
    assert {name for name in names[apart] if name.startswith("optimizer")} == set(ranks[:2])
    assert {name for name in names[other] if name.startswith("optimizer")} == {ranks[2]}
    small = names[apart] - set(ranks)
    assert small == names[other] - set(ranks)
    assert {"config.json", "tokenizer.json", "trainer_state.json", "manifest.json"} <= small
    assert not any(name.startswith("model") for name in small), "nobody takes a part for a model"
    for name in small:
        assert (apart / "checkpoint-4" / name).read_bytes() == (other / "checkpoint-4" / name).read_bytes()
    manifest = read_manifest(apart / "checkpoint-4")
    assert manifest.hosts == dict(zip(ranks, ("node0", "node0", "node1"), strict=True))
    assert not [path for node in (apart, other) for path in node.glob(".checkpoint*")]
    assert log(apart) == log(shared)
    assert equal(apart, shared), "rank 0 writes the whole model"
    assert not list(other.glob("model*")), "and no other node does"


@pytest.mark.parametrize("wanted", [True, slow("runs/apart/checkpoint-4")])
def test_the_same_ranks_go_on(folder, shared, apart, wanted):
    """From the newest checkpoint that both nodes have, bit for bit."""
    for node in ("node0", "node1"):
        shutil.copytree(folder / node / "runs" / "apart", folder / node / "runs" / f"again-{wanted is True}")
    newest = folder / "node1" / "runs" / f"again-{wanted is True}" / "checkpoint-6"
    if wanted is True:
        shutil.rmtree(newest)  # as if the node was killed before it had renamed the folder
    out = "apart2" if wanted is not True else "again-True"
    again = run(folder, out, resume_from_checkpoint=wanted)
    assert log(again) == log(shared)
    assert equal(again, shared)
    if wanted is True:
        assert newest.is_dir()


@pytest.mark.parametrize("nodes", [(0, 1), slow((0, 0, 1))])
def test_a_merged_folder_is_for_any_number_of_ranks(folder, shared, apart, nodes, tmp_path):
    merged = merge(folder, "apart/checkpoint-4", tmp_path / "checkpoint-4")
    arguments = {"per_device_train_batch_size": 3} if len(nodes) == 2 else {}
    again = run(folder, f"merged{len(nodes)}", nodes, resume_from_checkpoint=merged, **arguments)
    for row, expected in zip(log(again), log(shared), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    difference = max(float((weights(again)[name] - value).abs().max()) for name, value in weights(shared).items())
    assert difference < 1e-5 if len(nodes) == 2 else difference == 0


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_export_of_a_merged_folder(folder, shared, apart, dtype, tmp_path, capsys):
    words = ["--save_dtype", dtype] if dtype else []
    assert export([str(apart / "checkpoint-6"), str(tmp_path / "out"), *words]) == 2
    assert error_codes(capsys.readouterr().err)[-1:] == ["export.on_another_host"]
    merged = merge(folder, "apart/checkpoint-6", tmp_path / "checkpoint-6")
    assert export([str(merged), str(tmp_path / "out"), *words]) == 0
    assert equal(tmp_path / "out", shared)


def test_the_list_says_what_is_elsewhere(folder, apart, tmp_path, capsys):
    assert list_checkpoints([str(apart), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("1 file on node1" in line for line in lines[1:]), lines
    merge(folder, "apart/checkpoint-4", tmp_path / "checkpoint-4")
    assert list_checkpoints([str(tmp_path), "--verify"]) == 0
    assert "node1" not in capsys.readouterr().out


REFUSED = {
    "without the option": ({"save_on_each_node": False}, NODES, "export.folder_not_shared"),
    "other order": ({"resume_from_checkpoint": "runs/apart/checkpoint-4"}, (0, 1, 1), "resume.on_another_host"),
    "other number": ({"resume_from_checkpoint": "runs/apart/checkpoint-4"}, (0, 1), "resume.on_another_host"),
    "first host is new": ({"resume_from_checkpoint": "auto", "output_dir": "runs/second"}, NODES, "resume.not_on_first_host"),
    "two runs": ({"resume_from_checkpoint": "runs/mixed/checkpoint-4"}, NODES, "resume.differs_between_hosts"),
    "deepspeed": ({"checkpoint_format": "deepspeed"}, NODES, "arguments.needs_sharded_checkpoints"),
}


def refused(folder, nodes, arguments, code):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(AssertionError):
        job(folder, nodes, arguments)
    if os.environ["RANK"] == "0":
        assert error_codes(said.getvalue()) == [code], said.getvalue()


@pytest.mark.parametrize("case", slow_except(["other order"], REFUSED))
def test_refused(folder, apart, case):
    arguments, nodes, code = REFUSED[case]
    if case == "two runs":
        for node in ("node0", "node1"):
            shutil.copytree(folder / node / "runs" / "apart", folder / node / "runs" / "mixed")
        manifest = folder / "node1" / "runs" / "mixed" / "checkpoint-4" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"samples": 1}))
    if case == "first host is new":
        shutil.copytree(folder / "node1" / "runs" / "apart", folder / "node1" / "runs" / "second")
    given = {"output_dir": f"runs/refused-{case[:4].strip()}", "save_on_each_node": True, **arguments}
    run_ranks(len(nodes), refused, {"folder": folder, "nodes": nodes, "arguments": given, "code": code}, 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"save_async": False}, {"bf16": True}, {"deepspeed": "zero3_offload"}, {"local_save_dir": "scratch"}]
)
def test_variants(folder, changes):
    """Saves that wait, bf16 with master weights, and offload: interrupted or not, bit for bit."""
    name = "-".join(map(str, changes))
    whole = run(folder, f"whole-{name}", **changes)
    again = run(folder, f"again-{name}", resume_from_checkpoint=f"runs/whole-{name}/checkpoint-4", **changes)
    assert log(again) == log(whole)
    assert equal(again, whole)


@pytest.mark.slow
def test_the_best_model_and_the_limit(folder):
    """The best checkpoint's weights come back from both nodes; one more than the limit is not kept on either."""
    best = {
        "eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5,
        "load_best_model_at_end": True, "save_total_limit": 1,
    }  # fmt: skip
    expected = run(folder, "best-shared", output_dir=folder / "best-shared", **best) and folder / "best-shared"
    out = run(folder, "best", **best)
    assert equal(out, expected)
    kept = {path.name for path in expected.glob("checkpoint-*")}
    assert {path.name for path in out.glob("checkpoint-*")} == kept
    assert {path.name for path in (folder / "node1" / "runs" / "best").glob("checkpoint-*")} == kept
    last = load_file(max(expected.glob("checkpoint-*")) / "model.safetensors")
    assert not all(torch.equal(last[name], value) for name, value in weights(out).items()), "the best is not the last"
