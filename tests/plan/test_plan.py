"""Plans of any rank of any world, without processes."""

import random

import pytest

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import shard_range
from zero_sft.plan.plan import Run, Target, plan_reads


def stored(name, numel, offset, dtype="BF16"):
    size = {"BF16": 2, "F32": 4}[dtype]
    return StoredTensor(name=name, file="f", dtype=dtype, shape=(numel,), offset_bytes=offset, nbytes=numel * size)


def target(numel, rank, world_size, runs):
    return Target(name="t", numel=numel, span=shard_range(numel, rank, world_size), runs=tuple(runs))


def test_exact_offsets():
    run = Run(target_start=0, source="s", source_start=0, numel=10)
    plan = plan_reads([target(10, 1, 4, [run])], {"s": stored("s", 10, 100)})
    (read,) = plan.reads
    assert (read.offset_bytes, read.nbytes, read.start) == (106, 6, 0)
    assert plan_reads([target(10, 3, 4, [run])], {"s": stored("s", 10, 100)}).nbytes == 2
    assert plan_reads([target(2, 3, 4, [Run(target_start=0, source="s", source_start=0, numel=2)])],
                      {"s": stored("s", 2, 0)}).reads == ()  # fmt: skip


def test_pieces_of_one_parameter_from_several_tensors():
    """Elements 0..3 of the target are a[2:6], 4..8 are b[0:5]; rank 1 of 2 keeps [5, 9): b[1:5]."""
    runs = [
        Run(target_start=0, source="a", source_start=2, numel=4),
        Run(target_start=4, source="b", source_start=0, numel=5),
    ]
    sources = {"a": stored("a", 6, 0), "b": stored("b", 5, 12)}
    (read,) = plan_reads([target(9, 1, 2, runs)], sources).reads
    assert (read.offset_bytes, read.nbytes, read.start) == (14, 8, 0)
    first, second = plan_reads([target(9, 0, 2, runs)], sources).reads
    assert (first.offset_bytes, first.nbytes, first.start) == (4, 8, 0)
    assert (second.offset_bytes, second.nbytes, second.start) == (12, 2, 4)


@pytest.mark.parametrize("runs", [
    [Run(target_start=0, source="s", source_start=0, numel=9)],
    [Run(target_start=1, source="s", source_start=0, numel=9)],
    [Run(target_start=0, source="s", source_start=0, numel=6), Run(target_start=5, source="s", source_start=0, numel=5)],
    [Run(target_start=0, source="s", source_start=5, numel=10)],
])  # fmt: skip
def test_gaps_overlaps_and_overruns_are_refused(runs):
    with pytest.raises(CheckpointError):
        plan_reads([target(10, 0, 1, runs)], {"s": stored("s", 10, 0)})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1024])
def test_over_all_ranks_every_byte_is_read_once(world_size):
    draw = random.Random(world_size)
    numels = [draw.randrange(0, 5000) for _ in range(20)]
    sources, targets, offset = {}, [], 0
    for i, numel in enumerate(numels):
        sources[f"s{i}"] = stored(f"s{i}", numel, offset, draw.choice(["BF16", "F32"]))
        offset += sources[f"s{i}"].nbytes
        targets.append((f"t{i}", numel, Run(target_start=0, source=f"s{i}", source_start=0, numel=numel)))
    covered = []
    for rank in range(world_size):
        mine = [
            Target(name=name, numel=numel, span=shard_range(numel, rank, world_size), runs=(run,))
            for name, numel, run in targets
        ]
        plan = plan_reads(mine, sources)
        assert plan == plan_reads(mine, sources)
        covered += [(read.offset_bytes, read.offset_bytes + read.nbytes) for read in plan.reads]
    position = 0
    for start, stop in sorted(covered):
        assert start == position
        position = stop
    assert position == offset
