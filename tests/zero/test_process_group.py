"""A rank that can't find the others, or has no device, is told so before anything waits."""

from types import SimpleNamespace

import pytest

from tests.errors import raises
from zero_sft.cluster.world import World
from zero_sft.errors import Scope
from zero_sft.zero import process_group


@pytest.mark.parametrize("absent", [("MASTER_ADDR",), ("MASTER_PORT",), ("MASTER_ADDR", "MASTER_PORT")])
def test_a_master_address_without_its_port(monkeypatch, absent):
    monkeypatch.setattr(process_group, "require_own_device", lambda world: None)
    monkeypatch.setattr(process_group, "install_operator_builder", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.delenv(name, raising=False)
        if name not in absent:
            monkeypatch.setenv(name, value)
    with raises("cluster.no_master_address", *absent):
        process_group._start_default_group(World(world_size=2))


@pytest.fixture
def see(monkeypatch):
    def sees(name, count):
        found = SimpleNamespace(device_name=lambda: name, device_count=lambda: count)
        monkeypatch.setattr(process_group, "get_accelerator", lambda: found)

    return sees


@pytest.mark.parametrize(("local_rank", "speaks"), [(1, True), (2, False)])
def test_one_device_for_each_task_is_refused(see, local_rank, speaks):
    see("cuda", 1)
    world = World(rank=local_rank + 4, world_size=8, local_rank=local_rank, local_world_size=4)
    with raises("cluster.rank_without_device", f"local rank {local_rank}", "1 device", "--gpus-per-node") as caught:
        process_group.require_own_device(world)
    assert (caught.value.scope is Scope.THIS_RANK) == speaks


def test_all_devices_are_seen(see):
    see("cuda", 4)
    for local_rank in range(4):
        process_group.require_own_device(World(rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4))


def test_cpu_ranks_need_none(see):
    see("cpu", 1)
    process_group.require_own_device(World(rank=3, world_size=4, local_rank=3, local_world_size=4))
