"""Each check of the preflight, on facts that are made up."""

import copy
import os

import pytest

from zero_sft.cluster.node_facts import collect, describe_folder, describe_model, describe_path
from zero_sft.preflight.checks import Needs, judge

GIB = 2**30
FOLDER = {"free": 100 * GIB, "problem": ""}
FACTS = {
    "versions": {"python": "3.12.1", "torch": "2.11", "deepspeed": "0.19.8", "transformers": "5.23.0"},
    "model": {"config": "aa", "files": 4, "bytes": 16 * GIB}, "data": {"/data/a.json": ""}, "output": FOLDER,
    "caches": {"cache": FOLDER}, "memory": 500 * GIB, "shared_memory": 64 * GIB, "open_files": 65_536,
    "stale": {"count": 0, "bytes": 0}, "gpus": {"count": 8, "names": ["H100"], "driver": "570"}, "granted_gpus": 8,
    "variables": {},
    "time": 1000.0, "sees_output": True, "devices": 8, "ranks": 8,
}  # fmt: skip
NEEDS = Needs(host_bytes=200 * GIB, output_bytes=50 * GIB)


def nodes(*changes):
    made = [{**copy.deepcopy(FACTS), "host": f"node{number}"} for number in range(1, 4)]
    for number, change in changes:
        made[number - 1] |= change
    return made


def found(name, *changes, needs=NEEDS):
    return {check.name: check for check in judge(nodes(*changes), needs)}[name]


def test_all_is_well():
    assert {check.state for check in judge(nodes(), NEEDS)} == {"ok"}


@pytest.mark.parametrize(("name", "change", "state", "text"), [
    ("versions", {"versions": {**FACTS["versions"], "torch": "2.10"}}, "FAILED", "torch: 2.11 on node1, node3; 2.10 on node2"),
    ("devices", {"devices": 4}, "FAILED", "node2: 4 devices for 8 ranks"),
    ("devices", {"gpus": {}, "devices": 0, "granted_gpus": 0}, "FAILED", "570 on node1, node3; no GPU on node2"),
    ("devices", {"gpus": {}, "devices": 0}, "FAILED", "node2: SLURM has given 8 GPUs, and torch 2.11 finds none"),
    ("devices", {"gpus": {"count": 8, "names": ["H100"], "driver": "535"}}, "FAILED", "535 on node2"),
    ("network variables", {"variables": {"NCCL_IB_HCA": "x"}}, "WARNING", "NCCL_IB_HCA: none on node1, node3; x on node2"),
    ("model", {"model": {"problem": "/m/config.json: No such file"}}, "FAILED", "node2: /m/config.json: No such file"),
    ("model", {"model": None}, "FAILED", "node2: no such folder"),
    ("model", {"model": {"config": "bb", "files": 4, "bytes": 16 * GIB}}, "FAILED", "config bb"),
    ("data", {"data": {"/data/a.json": "Permission denied"}}, "FAILED", "node2: /data/a.json: Permission denied"),
    ("output", {"output": {"free": GIB, "problem": "Read-only file system"}}, "FAILED", "node2: Read-only file system"),
    ("output", {"sees_output": False}, "FAILED", "node2: another file system"),
    ("output", {"output": {"free": GIB, "problem": ""}}, "FAILED", "1.0 GiB are free"),
    ("output", {"output": {"free": None, "problem": ""}}, "ok", ""),
    ("cache", {"caches": {"cache": {"free": 0, "problem": "Permission denied"}}}, "FAILED", "node2: Permission denied"),
    ("host memory", {"memory": 100 * GIB}, "WARNING", "node2: 100.0 GiB available"),
    ("/dev/shm", {"shared_memory": 64 << 20}, "WARNING", "node2: 64.0 MiB free"),
    ("/dev/shm", {"stale": {"count": 2, "bytes": GIB}}, "WARNING", "node2: 2 files of earlier runs (1.0 GiB)"),
    ("open files", {"open_files": 256}, "WARNING", "node2: limit 256"),
    ("clocks", {"time": 1042.0}, "WARNING", "node2: +42 s"),
])  # fmt: skip
def test_one_node_that_differs(name, change, state, text):
    check = found(name, (2, change))
    assert check.state == state
    assert text in check.problem
    assert bool(check.remedy)


def test_an_output_on_each_node_may_be_anywhere():
    assert found("output", (2, {"sees_output": False}), needs=Needs(on_each_node=True)).state == "ok"


def test_a_hub_id_is_not_looked_for():
    everywhere = [(number, {"model": None}) for number in (1, 2, 3)]
    assert found("model", *everywhere).found == "from the hub: fetched at the start"


def test_facts_of_this_machine(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    facts = collect(model=tmp_path, data=[tmp_path / "no.json"], output=tmp_path / "a" / "b", caches={"cache": tmp_path})
    assert facts["versions"]["torch"]
    assert facts["model"] == {"problem": f"{tmp_path} has no weights"}
    assert facts["data"] == {str(tmp_path / "no.json"): "No such file or directory"}
    assert facts["output"]["problem"] == ""
    assert facts["output"]["free"] > 0
    assert facts["memory"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"], "nothing is left"


def test_a_model_is_described(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    assert describe_model(tmp_path) == {"config": "44136fa355b3", "files": 1, "bytes": 10}
    assert "No such file" in describe_model(tmp_path / "no")["problem"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_this_user_may_not(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "a").chmod(0)
    assert describe_path(tmp_path / "a") == "Permission denied"
    tmp_path.chmod(0o500)
    assert describe_folder(tmp_path)["problem"] == "Permission denied"
    tmp_path.chmod(0o700)
