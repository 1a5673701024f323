"""Pieces written are the ones that a load would read, and not a byte between them."""

import random

import pytest
import torch

from zero_sft.plan.partition import shard_range
from zero_sft.plan.plan import SourceMap, copy_specs
from zero_sft.plan.regions import identity_regions, permute, reshape
from zero_sft.storage import writer

SHAPES = [(7,), (5, 6), (3, 4, 5), (2, 3, 2, 5)]


@pytest.mark.parametrize("limit_bytes", [16, 2**20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_together_write_a_permuted_tensor(tmp_path, monkeypatch, shape, ranks, limit_bytes):
    monkeypatch.setattr(writer, "MAX_PART_BYTES", limit_bytes)
    stored = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    order = random.Random(str(shape)).sample(range(len(shape)), len(shape))
    own = stored.permute(order).contiguous()
    regions = permute(identity_regions("stored", shape), order)
    path, offset = tmp_path / "x", 24
    path.write_bytes(b"\xff" * (offset + stored.nbytes + 8))
    with path.open("r+b") as file:
        for rank in reversed(range(ranks)):
            span = shard_range(own.numel(), rank, ranks)
            flat = torch.cat([torch.full((3,), -1.0), own.reshape(-1)[span.start : span.stop]])[3:]
            for piece in copy_specs(SourceMap.of("own", tuple(own.shape), regions), span):
                writer.write_copy(file.fileno(), path, flat, piece, offset)
    data = path.read_bytes()
    assert data[:offset] == b"\xff" * offset
    assert data[-8:] == b"\xff" * 8
    assert torch.equal(torch.frombuffer(bytearray(data[offset:-8]), dtype=torch.float32).view(shape), stored)


def test_a_part_leaves_the_rest_alone(tmp_path):
    """A rank that holds the middle of a merged tensor writes that, and not what other ranks write."""
    path = tmp_path / "x"
    path.write_bytes(b"\x00" * 4 * 24)
    regions = reshape(identity_regions("stored", (4, 6)), (4, 6), (24,))
    span = shard_range(24, 1, 3)
    with path.open("r+b") as file:
        for piece in copy_specs(SourceMap.of("own", (24,), regions), span):
            writer.write_copy(file.fileno(), path, torch.ones(span.numel), piece, 0)
    found = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    assert found.nonzero().view(-1).tolist() == list(range(span.start, span.stop))
