"""ZeRO-3's arithmetic, held against DeepSpeed's in tests/zero and by properties here."""

import pytest

from zero_sft.plan.partition import full_range, partition_numel, shard_range


def test_worked_examples():
    spans = [(shard_range(10, rank, 4).start, shard_range(10, rank, 4).stop) for rank in range(4)]
    assert spans == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [shard_range(2, rank, 4).numel for rank in range(4)] == [1, 1, 0, 0]
    assert partition_numel(0, 4) == 0
    assert (full_range(7).start, full_range(7).stop) == (0, 7)


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 8, 9, 1000, 4097])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64, 1024])
def test_ranges_are_disjoint_covering_and_of_one_size(numel, world_size):
    position = 0
    for rank in range(world_size):
        span = shard_range(numel, rank, world_size)
        assert span.start == position
        assert 0 <= span.numel <= partition_numel(numel, world_size)
        position = span.stop
    assert position == numel
