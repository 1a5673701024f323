"""Ranks that can't find each other are told so before anything waits."""

import pytest

from tests.errors import raises
from zero_sft.cluster.world import World
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
