"""Exchanges, and failures that all ranks raise together."""

import datetime

import pytest

from tests.errors import raises
from zero_sft import distributed
from zero_sft.errors import CheckpointError
from zero_sft.world import World


@pytest.mark.world_size(1, 3)
def test_exchanges():
    world = distributed.connect(World.detect())
    payload = bytes(range(world.rank * 5))
    assert distributed.exchange_bytes(world, payload) == [bytes(range(r * 5)) for r in range(world.world_size)]
    assert distributed.broadcast_bytes(world, b"abc" if world.is_main else None) == b"abc"
    assert distributed.broadcast_bytes(world, b"" if world.is_main else None) == b""
    assert distributed.exchange(world, {"rank": world.rank}) == [{"rank": r} for r in range(world.world_size)]


@pytest.mark.world_size(3)
def test_a_failure_on_one_rank_is_raised_by_all():
    world = World.detect()
    distributed.connect(world)
    with raises("checkpoint.broken", "broken", "rank 1 of 3 while reading") as caught:
        with distributed.agreed(world, "reading"):
            if world.rank == 1:
                raise CheckpointError("broken", code="checkpoint.broken")
    assert type(caught.value) is CheckpointError
    with raises("cluster.rank_failed", "ZeroDivisionError"):
        with distributed.agreed(world, "dividing"):
            if world.rank == 2:
                1 / 0  # noqa: B018
    with distributed.agreed(world, "passing"):
        pass


@pytest.mark.world_size(3)
def test_disagreement_names_keys_and_ranks():
    world = World.detect()
    distributed.connect(world)
    distributed.agree_on(world, "config", {"a": 1, "b": [1, 2]})
    with raises("cluster.ranks_disagree", "a: 1 on rank 0, 2; 7 on rank 1"):
        distributed.agree_on(world, "config", {"a": 7 if world.rank == 1 else 1, "b": 2})


@pytest.mark.world_size(1, 3)
def test_what_a_stage_tells_travels_with_its_end():
    world = World.detect()
    distributed.connect(world)
    with distributed.agreed(world, "counting") as told:
        told.mine = {"rank": world.rank}
        told.same = ("config", {"a": 1})
    assert told.everyone == [{"rank": rank} for rank in range(world.world_size)]


@pytest.mark.world_size(3)
def test_a_stage_whose_ranks_differ():
    world = World.detect()
    distributed.connect(world)
    with raises("cluster.ranks_disagree", "config", "a: 1 on rank 0, 2; 7 on rank 1"):
        with distributed.agreed(world, "reading") as told:
            told.same = ("config", {"a": 7 if world.rank == 1 else 1})
    with raises("checkpoint.broken", "rank 2 of 3 while reading"):  # the failure says more than the difference
        with distributed.agreed(world, "reading") as told:
            if world.rank == 2:
                raise CheckpointError("broken", code="checkpoint.broken")
            told.same = ("config", {"a": world.rank})


def test_a_dead_rank_is_told_from_a_slow_one(monkeypatch):
    """gloo's message is the same, and names the time that it would have waited."""

    def barrier(**_):
        raise RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 1800000 ms")

    monkeypatch.setattr(distributed.dist, "monitored_barrier", barrier)
    with raises("cluster.rank_lost", "rank 1", "'reading'"):
        with distributed.agreed(World(world_size=2), "reading"):
            pass
    with raises("cluster.rank_late", "rank 1", "'reading'", "0:00:00"):
        with distributed.agreed(World(world_size=2), "reading", datetime.timedelta(0)):
            pass
