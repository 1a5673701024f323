"""Plans of any rank of any world, without processes."""

import math
import random

import pytest
import torch

from tests.errors import raises
from tests.plan.test_regions import random_tensor
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.plan import plan as planning
from zero_sft.plan import regions
from zero_sft.plan.partition import shard_range
from zero_sft.plan.plan import SourceMap, check_cover, plan_reads


def stored(name, numel, offset, dtype="BF16"):
    size = {"BF16": 2, "F32": 4}[dtype]
    return StoredTensor(name=name, file="f", dtype=dtype, shape=(numel,), offset_bytes=offset, nbytes=numel * size)


def target(shape, rank, world_size, parts):
    span = shard_range(math.prod(shape), rank, world_size)
    return SourceMap.of("t", shape, tuple(parts)), span


def deliver(reads, local, offset_bytes=0, itemsize=2):
    """Carry out reads on a "file" whose element number is its contents, into the list `local`."""
    for read in reads:
        first = (read.offset_bytes - offset_bytes) // itemsize
        for flat in range(math.prod(read.sizes)):
            index, rest = [], flat
            for size in reversed(read.sizes):
                index.insert(0, rest % size)
                rest //= size
            place = sum(i * stride for i, stride in zip(index, read.source_strides, strict=True))
            assert place * itemsize < read.nbytes
            offset = sum(i * stride for i, stride in zip(index, read.target_strides, strict=True))
            local[read.target_start + offset] = first + place


def test_exact_offsets():
    parts = regions.identity_regions("s", (10,))
    (read,) = plan_reads([target((10,), 1, 4, parts)], {"s": stored("s", 10, 100)})
    assert (read.offset_bytes, read.nbytes, read.target_start, read.is_contiguous) == (106, 6, 0, True)
    (read,) = plan_reads([target((10,), 3, 4, parts)], {"s": stored("s", 10, 100)})
    assert read.total_nbytes == 2
    assert plan_reads([target((2,), 3, 4, regions.identity_regions("s", (2,)))], {"s": stored("s", 2, 0)}) == ()
    (read,) = plan_reads([target((), 0, 2, regions.identity_regions("s", ()))], {"s": stored("s", 1, 6)})
    assert (read.offset_bytes, read.nbytes, read.target_start, read.is_contiguous) == (6, 2, 0, True)


def test_pieces_of_one_parameter_from_several_tensors():
    """Elements 0..3 of the target are a[2:6], 4..8 are b[0:5]; rank 1 of 2 keeps [5, 9): b[1:5]."""
    a, b = regions.narrow(regions.identity_regions("a", (6,)), 0, 2, 6), regions.identity_regions("b", (5,))
    parts = regions.concatenate([((4,), a), ((5,), b)], 0)
    sources = {"a": stored("a", 6, 0), "b": stored("b", 5, 12)}
    (read,) = plan_reads([target((9,), 1, 2, parts)], sources)
    assert (read.offset_bytes, read.nbytes, read.target_start) == (14, 8, 0)
    first, second = plan_reads([target((9,), 0, 2, parts)], {**sources, "b": stored("b", 5, 14)})
    assert (first.offset_bytes, first.nbytes, first.target_start) == (4, 8, 0)
    assert (second.offset_bytes, second.nbytes, second.target_start) == (14, 2, 4)


def test_what_goes_on_here_and_there_is_one_read():
    """Of a 5 × 3 matrix rank 1 of 2 keeps elements 8 to 14, the last of row 2 and two rows: one run."""
    (read,) = plan_reads([target((5, 3), 1, 2, regions.identity_regions("s", (5, 3)))], {"s": stored("s", 15, 100)})
    assert (read.offset_bytes, read.nbytes, read.target_start, read.sizes) == (116, 14, 0, (7,))
    swapped = regions.concatenate([((2,), regions.identity_regions("b", (2,))), ((2,), regions.identity_regions("a", (2,)))], 0)
    reads = plan_reads([target((4,), 0, 1, swapped)], {"a": stored("a", 2, 0), "b": stored("b", 2, 4)})
    assert [(read.offset_bytes, read.target_start) for read in reads] == [(0, 2), (4, 0)], "neighbours in the file alone"


def test_a_transposed_matrix_is_read_row_by_row():
    """Rank 0 of 2 keeps the first 2 of 4 columns of a 3 × 4 matrix as it is stored."""
    parts = regions.permute(regions.identity_regions("s", (3, 4)), (1, 0))
    (read,) = plan_reads([target((4, 3), 0, 2, parts)], {"s": stored("s", 12, 0)})
    assert (read.nbytes, read.sizes, read.source_strides, read.target_strides) == (20, (3, 2), (4, 1), (1, 3))


@pytest.mark.parametrize(("parts", "code"), [
    (regions.identity_regions("s", (9,)), "plan.elements_missing"),
    (regions.narrow(regions.identity_regions("s", (20,)), 0, 1, 11), "plan.read_beyond_tensor"),
])  # fmt: skip
def test_gaps_and_overruns_are_refused(parts, code):
    with raises(code, "t:"):
        check_cover(SourceMap.of("t", (10,), parts), {"s": stored("s", 10, 0)})


@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize(("gap", "limit"), [(4096, 2**23), (0, 16), (6, 64)])
def test_every_rank_gets_its_elements(monkeypatch, seed, gap, limit):
    """Whatever a conversion did, whatever the world, and however small the ranges that are read."""
    monkeypatch.setattr(planning, "GAP_BYTES", gap)
    monkeypatch.setattr(planning, "SCATTER_BYTES", limit)
    draw = random.Random(seed)
    parts, tensor = random_tensor(draw, draw.randint(0, 5))
    shape, numel = tuple(tensor.shape), tensor.numel()
    world_size = draw.choice([1, 2, 3, 8])
    source = stored("s", int(tensor.max()) + 1, 10)
    result = []
    for rank in range(world_size):
        mine = target(shape, rank, world_size, parts)
        local = [-1] * mine[1].numel
        reads = plan_reads([mine], {"s": source})
        assert all(read.is_contiguous or read.nbytes <= max(limit, 2) for read in reads)
        deliver(reads, local, offset_bytes=10)
        result += local
    assert torch.equal(torch.tensor(result), tensor.reshape(-1)), numel


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1024])
def test_over_all_ranks_every_byte_is_read_once(world_size):
    draw = random.Random(world_size)
    numels = [draw.randrange(0, 5000) for _ in range(20)]
    sources, wanted, offset = {}, [], 0
    for i, numel in enumerate(numels):
        sources[f"s{i}"] = stored(f"s{i}", numel, offset, draw.choice(["BF16", "F32"]))
        offset += sources[f"s{i}"].nbytes
        wanted.append((f"t{i}", (numel,), regions.identity_regions(f"s{i}", (numel,))))
    covered = []
    for rank in range(world_size):
        mine = [(SourceMap.of(name, shape, parts), shard_range(shape[0], rank, world_size)) for name, shape, parts in wanted]
        reads = plan_reads(mine, sources)
        assert reads == plan_reads(mine, sources)
        covered += [(read.offset_bytes, read.offset_bytes + read.nbytes) for read in reads]
    position = 0
    for start, stop in sorted(covered):
        assert start == position
        position = stop
    assert position == offset


@pytest.mark.parametrize("world_size", [2, 64])
def test_merged_experts_are_read_once(world_size):
    """Stacked and concatenated, as Mixtral's: gate and up of each expert side by side. No byte twice, no gap read along."""
    experts, rows, width = 5, 300, 70
    sources, parts = {}, []
    for i in range(experts):
        for half in ("gate", "up"):
            name = f"{half}{i}"
            sources[name] = stored(name, rows * width, len(sources) * rows * width * 2)
        pair = [((rows, width), regions.identity_regions(f"{half}{i}", (rows, width))) for half in ("gate", "up")]
        parts.append(((1, 2 * rows, width), regions.add_dim(regions.concatenate(pair, 0), 0)))
    shape = (experts, 2 * rows, width)
    merged = regions.concatenate(parts, 0)
    reads = [read for rank in range(world_size) for read in plan_reads([target(shape, rank, world_size, merged)], sources)]
    assert sum(read.total_nbytes for read in reads) == math.prod(shape) * 2
    assert all(read.is_contiguous for read in reads)
