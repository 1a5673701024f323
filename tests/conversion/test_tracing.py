"""Tracing against torch: an operation on provenance gives what it gives on data; one that computes is refused."""

import math

import pytest
import torch

from tests.plan.provenance import elements
from zero_sft.conversion import tracing
from zero_sft.conversion.tracing import NotTraceable


def pair(*shape):
    """A traced source, and a tensor of its flat positions."""
    return tracing.trace_stored("s", shape, torch.float32), torch.arange(math.prod(shape)).reshape(shape)


MOVES = {
    "chunk": lambda x: x.chunk(3, 0)[1].contiguous(),
    "uneven chunk": lambda x: x.chunk(4, 0)[-1],
    "split": lambda x: torch.split(x, [1, 2, 3], 0)[2],
    "rope": lambda x: x.reshape(3, 2, -1).transpose(0, 1).reshape(6, -1).contiguous(),
    "interleave": lambda x: x.reshape(6, 2, 2).transpose(1, 2).reshape(x.shape),
    "stack": lambda x: torch.stack([x, x.clone()], 1).flatten(0, 1),
    "stack last": lambda x: torch.stack([x[:, 0], x[:, 1]], -1),
    "T": lambda x: x.T.contiguous(),
    "mT": lambda x: x.mT,
    "unbind": lambda x: x.unbind(0)[2],
    "strided": lambda x: x[..., ::2],
    "negative": lambda x: x[-3:, -1],
    "squeeze": lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze(),
    "squeeze dim": lambda x: x.unsqueeze(0).squeeze(0),
    "movedim": lambda x: x.view(2, 3, 4).movedim(0, 2),
    "concat": lambda x: torch.concat([x[:2], x[4:]]),
    "expand": lambda x: x[None].expand(3, -1, -1).reshape(18, 4),
    "same dtype": lambda x: x.to(x.dtype).detach(),
    "permute": lambda x: x.permute(1, 0).reshape(-1),
    "empty": lambda x: x[2:2],
}


@pytest.mark.parametrize("name", MOVES)
def test_as_torch_has_it(name):
    traced, tensor = (MOVES[name](each) for each in pair(6, 4))
    assert tuple(traced.shape) == tuple(tensor.shape)
    found = elements(traced.regions)
    assert len(found) == tensor.numel()
    assert all(place == int(tensor[index]) for index, (_, place) in found.items())


@pytest.mark.parametrize("compute", [
    lambda x: x * 2,
    lambda x: x.to(torch.bfloat16),
    lambda x: torch.cat([x, torch.zeros(1, 4)]),
    lambda x: x[torch.tensor([0, 1])],
    lambda x: x.sum(0),
    lambda x: torch.where(x > 0, x, x),
])  # fmt: skip
def test_what_computes_is_refused(compute):
    with pytest.raises(NotTraceable):
        compute(pair(6, 4)[0])
