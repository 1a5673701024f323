"""Where ranks meet whose launcher has not said it."""

import os

import pytest

from zero_sft.cluster.rendezvous import hosts_of_list, meeting_place
from zero_sft.cluster.world import World

STEP = {"SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(("nodes", "first"), [
    ("node7", "node7"), ("gpu[07-09,12],login1", "gpu07"), ("a1,b[1-3]", "a1"), ("rack[0-1]node[01-04]", "rack0node01"),
    ("x[3,5-7]", "x3"), ("dgx-a100-[01-16]", "dgx-a100-01"), ("cn[1-2]-ib", "cn1-ib"),
])  # fmt: skip
def test_first_host(nodes, first):
    assert hosts_of_list(nodes)[0] == first


def test_all_hosts():
    assert hosts_of_list("gpu[07-09,12],login1") == ["gpu07", "gpu08", "gpu09", "gpu12", "login1"]
    assert hosts_of_list("r[0-1]n[9-10]") == ["r0n9", "r0n10", "r1n9", "r1n10"]
    assert hosts_of_list("") == []


def test_a_slurm_step():
    world = World(rank=1, world_size=6, local_world_size=2)
    assert meeting_place(world, STEP) == {"MASTER_ADDR": "gpu07", "MASTER_PORT": str(20_000 + 123456 % 12_000)}
    other_step = meeting_place(world, {**STEP, "SLURM_STEP_ID": "1"})
    assert other_step["MASTER_PORT"] != meeting_place(world, STEP)["MASTER_PORT"], "two runs in one allocation"
    assert meeting_place(world, {**STEP, "MASTER_ADDR": "x", "MASTER_PORT": "1"}) == {}
    assert meeting_place(world, {**STEP, "MASTER_ADDR": "x"}) == {"MASTER_PORT": "23456"}


def test_mpirun_on_one_machine():
    world = World(rank=1, world_size=2, local_world_size=2)
    env = {**STEP, "OMPI_COMM_WORLD_RANK": "1"}  # mpirun in a job of SLURM
    assert meeting_place(world, env) == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getppid() % 12_000)}
    assert meeting_place(World(rank=1, world_size=4, local_world_size=2), env) == {}
