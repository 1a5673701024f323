"""The nodes that ranks agree on, from the hosts that they run on."""

import dataclasses
import os

import pytest

from tests.errors import raises
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.node_layout import place_in_layout
from zero_sft.cluster.world import World
from zero_sft.zero.process_group import connect


def placed(hosts: str, local_ranks: str, devices: str = "cuda 0,1", cpus: tuple[str, ...] = ()) -> list[World]:
    """The world of each rank; a letter a host, a digit a local rank."""
    ranks = [
        {"host": host, "name": "localhost", "local_rank": int(local), "devices": devices, "cpus": "ff"}
        for host, local in zip(hosts, local_ranks, strict=True)
    ]
    for rank, mask in zip(ranks, cpus, strict=False):
        rank["cpus"] = mask
    return [
        place_in_layout(World(rank=i, world_size=len(ranks), local_rank=ranks[i]["local_rank"]), ranks)
        for i in range(len(ranks))
    ]


def test_uneven_nodes():
    worlds = placed("aaabb", "01210")  # DeepSpeed's launcher numbers the ranks of a later, smaller node so
    assert [world.local_world_size for world in worlds] == [3, 3, 3, 2, 2]
    assert [world.node_leader for world in worlds] == [0, 0, 0, 3, 3]
    assert [world.leads_node for world in worlds] == [True, False, False, True, False]
    assert [world.local_rank for world in worlds] == [0, 1, 2, 1, 0], "the device is the launcher's to choose"


def test_ranks_dealt_out_in_turn():
    worlds = placed("abab", "0011")
    assert [world.node_leader for world in worlds] == [0, 1, 0, 1]
    assert [world.local_world_size for world in worlds] == [2, 2, 2, 2]


def test_two_ranks_for_one_device():
    for _ in range(2):
        with raises("cluster.local_rank_shared", "ranks 0", "and 2", "localhost", "LOCAL_RANK=0"):
            placed("aba", "000")
    assert [world.local_rank for world in placed("aab", "000", devices="cpu")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("cpus", "own"),
    [
        (("ff", "ff"), [4, 4]),  # all may use all of the node
        (("0f", "f0"), [4, 4]),  # bound by srun
        (("03", "ff"), [1, 7]),
        (("01", "01"), [1, 1]),
    ],
)
def test_cores_of_a_rank(cpus, own):
    assert [world.cpu_cores for world in placed("aa", "01", cpus=cpus)] == own


@pytest.mark.world_size(3)
def test_the_hosts_decide_whatever_the_launcher_says():
    """DeepSpeed's launcher sets LOCAL_SIZE alone; a rank that knows neither took its local rank for the node's last."""
    os.environ.pop("LOCAL_WORLD_SIZE")
    world = connect(World.detect())
    assert world.local_world_size == 3
    assert world.node_leaders == (0, 0, 0)
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    assert connect(World.detect()) is world, "agreed on once"


@pytest.mark.world_size(3)
def test_one_rank_of_a_node_speaks():
    world = connect(World.detect())
    claims = all_gather_json(world, failure._claim_report())
    assert sorted(claims) == [False, False, True]


@pytest.mark.world_size(2)
def test_one_host_speaks():
    """Two hosts of one rank each, whose boards say nothing of each other: the store of the ranks does."""
    world = connect(World.detect())
    failure.set_board(dataclasses.replace(world, node_leaders=(0, 1)), None)
    assert sorted(all_gather_json(world, failure._claim_report())) == [False, True]
