"""Runs of saved shards that make a shard of another world size, held against slices of the whole tensor."""

import itertools

import pytest

from zero_sft.plan.partition import FlatRange, shard_range
from zero_sft.plan.reshard import SavedSpan, saved_spans


@pytest.mark.parametrize(("saved", "now"), itertools.product((1, 2, 3, 4, 8, 64), repeat=2))
@pytest.mark.parametrize("numel", [0, 1, 2, 7, 10, 64, 1001])
def test_every_element_comes_from_where_it_was_saved(saved, now, numel):
    whole = list(range(numel))
    shards = [whole[each.start : each.stop] for each in (shard_range(numel, rank, saved) for rank in range(saved))]
    for rank in range(now):
        mine = shard_range(numel, rank, now)
        found: list[int] = []
        for span in saved_spans(mine, numel, saved):
            assert span.target_start == len(found)
            part = shards[span.rank][span.source_start : span.source_start + span.numel]
            assert len(part) == span.numel > 0
            found += part
        assert found == whole[mine.start : mine.stop]


def test_worked_example():
    assert list(saved_spans(FlatRange(start=4, stop=8), 10, 4)) == [
        SavedSpan(rank=1, source_start=1, target_start=0, numel=2),
        SavedSpan(rank=2, source_start=0, target_start=2, numel=2),
    ]


def test_a_rank_needs_only_the_files_of_its_share():
    numels = (4096, 32000 * 4096)
    needed = {span.rank for numel in numels for span in saved_spans(shard_range(numel, 3, 8), numel, 1024)}
    assert needed == set(range(3 * 128, 4 * 128))
