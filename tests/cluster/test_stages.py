"""Tests of collective exchanges, and of failures that all ranks raise together."""

import datetime

import pytest

from tests.errors import raises
from zero_sft.cluster.control_group import all_gather_bytes, all_gather_json, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, dist, require_identical
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.zero.process_group import connect


@pytest.mark.world_size(1, 3)
def test_exchanges():
    world = connect(World.detect())
    payload = bytes(range(world.rank * 5))
    assert all_gather_bytes(world, payload) == [bytes(range(r * 5)) for r in range(world.world_size)]
    assert broadcast_bytes(world, b"abc" if world.is_main else None) == b"abc"
    assert broadcast_bytes(world, b"" if world.is_main else None) == b""
    assert all_gather_json(world, {"rank": world.rank}) == [{"rank": r} for r in range(world.world_size)]


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.world_size(3)
def test_a_failure_on_one_rank_is_raised_by_all():
    world = World.detect()
    connect(world)
    with raises("checkpoint.broken", "broken", "rank 1 of 3 while reading") as caught:
        with collective_stage(world, "reading"):
            if world.rank == 1:
                raise CheckpointError("broken", code="checkpoint.broken")
    assert type(caught.value) is CheckpointError
    with raises("cluster.rank_failed", "ZeroDivisionError"):
        with collective_stage(world, "dividing"):
            if world.rank == 2:
                1 / 0  # noqa: B018
    with raises("cluster.rank_failed", "PanicException: no entry found", "rank 0 of 3"):
        with collective_stage(world, "encoding"):
            if world.rank == 0:
                raise PanicException("no entry found")
    with collective_stage(world, "passing"):
        pass


@pytest.mark.world_size(3)
def test_disagreement_names_keys_and_ranks():
    world = World.detect()
    connect(world)
    require_identical(world, "config", {"a": 1, "b": [1, 2]})
    with raises("cluster.ranks_disagree", "a: 1 on rank 0, 2; 7 on rank 1"):
        require_identical(world, "config", {"a": 7 if world.rank == 1 else 1, "b": 2})


@pytest.mark.world_size(1, 3)
def test_what_a_stage_tells_travels_with_its_end():
    world = World.detect()
    connect(world)
    with collective_stage(world, "counting") as exchange:
        exchange.local = {"rank": world.rank}
        exchange.must_match = ("config", {"a": 1})
    assert exchange.gathered == [{"rank": rank} for rank in range(world.world_size)]


@pytest.mark.world_size(3)
def test_a_stage_whose_ranks_differ():
    world = World.detect()
    connect(world)
    with raises("cluster.ranks_disagree", "config", "a: 1 on rank 0, 2; 7 on rank 1"):
        with collective_stage(world, "reading") as exchange:
            exchange.must_match = ("config", {"a": 7 if world.rank == 1 else 1})
    with raises("checkpoint.broken", "rank 2 of 3 while reading"):  # the failure is more informative than the difference
        with collective_stage(world, "reading") as exchange:
            if world.rank == 2:
                raise CheckpointError("broken", code="checkpoint.broken")
            exchange.must_match = ("config", {"a": world.rank})


def test_a_dead_rank_is_told_from_a_slow_one(monkeypatch):
    """gloo's message is the same in both cases, and names the timeout."""

    def barrier(**_):
        raise RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 1800000 ms")

    monkeypatch.setattr(dist, "monitored_barrier", barrier)
    with raises("cluster.rank_lost", "rank 1", "'reading'"):
        with collective_stage(World(world_size=2), "reading"):
            pass
    with raises("cluster.rank_late", "rank 1", "'reading'", "0:00:00"):
        with collective_stage(World(world_size=2), "reading", datetime.timedelta(0)):
            pass
