"""Regions against torch: the same operations on a tensor that holds its own flat positions."""

import math
import random

import pytest
import torch

from tests.plan.provenance import elements
from zero_sft.plan import regions


def narrow(draw, parts, tensor):
    dim = draw.randrange(tensor.dim())
    start = draw.randrange(tensor.shape[dim])
    stop, step = draw.randint(start + 1, tensor.shape[dim]), draw.randint(1, 3)
    index = (*(slice(None),) * dim, slice(start, stop, step))
    return regions.narrow(parts, dim, start, stop, step), tensor[index]


def permute(draw, parts, tensor):
    order = draw.sample(range(tensor.dim()), tensor.dim())
    return regions.permute(parts, order), tensor.permute(order)


def reshape(draw, parts, tensor):
    left, shape = tensor.numel(), []
    while left > 1 and len(shape) < 4:
        shape.append(draw.choice([each for each in range(1, left + 1) if left % each == 0]))
        left //= shape[-1]
    shape = (*shape, left)
    return regions.reshape(parts, tuple(tensor.shape), shape), tensor.reshape(shape)


def concatenate(draw, parts, tensor):
    dim = draw.randrange(tensor.dim())
    shape = tuple(tensor.shape)
    return regions.concatenate([(shape, parts), (shape, parts)], dim), torch.cat([tensor, tensor], dim)


def add_and_drop(draw, parts, tensor):
    dim = draw.randint(0, tensor.dim())
    return regions.drop_dim(regions.add_dim(parts, dim), dim), tensor


def expand(draw, parts, tensor):
    dim = draw.randint(0, tensor.dim())
    single = tensor.unsqueeze(dim)
    shape = (*tensor.shape[:dim], 3, *tensor.shape[dim:])
    return regions.expand(regions.add_dim(parts, dim), tuple(single.shape), shape), single.expand(shape)


OPERATIONS = [narrow, permute, reshape, concatenate, add_and_drop, expand]


def random_tensor(draw, steps):
    """A tensor after some operations, and the regions that the same operations gave."""
    shape = tuple(draw.choice([1, 2, 3, 4, 6]) for _ in range(draw.randint(1, 4)))
    parts, tensor = regions.identity_regions("s", shape), torch.arange(math.prod(shape)).reshape(shape)
    for operation in draw.choices(OPERATIONS, k=steps):
        if tensor.numel() < 2000:
            parts, tensor = operation(draw, parts, tensor)
    return parts, tensor


@pytest.mark.parametrize("seed", range(300))
def test_as_torch_has_it(seed):
    draw = random.Random(seed)
    parts, tensor = random_tensor(draw, draw.randint(1, 7))
    found = elements(parts)
    assert len(found) == tensor.numel() == sum(math.prod(each.sizes) for each in parts)
    assert all(place == int(tensor[index]) for index, (_, place) in found.items())


def test_the_worked_example():
    turned = regions.permute(regions.identity_regions("s", (2, 3)), (1, 0))
    assert [(each.sizes, each.strides) for each in turned] == [((3, 2), (1, 3))]
    flat = regions.reshape(turned, (3, 2), (6,))
    assert [(each.start, each.sizes, each.offset, each.strides) for each in flat] == [
        ((0,), (2,), 0, (3,)),
        ((2,), (2,), 1, (3,)),
        ((4,), (2,), 2, (3,)),
    ]


def test_empty_tensors_have_no_regions():
    assert regions.identity_regions("s", (0, 3)) == ()
    assert regions.reshape((), (0, 3), (3, 0)) == ()


def test_too_many_pieces_are_refused(monkeypatch):
    monkeypatch.setattr(regions, "MAX_REGIONS", 100)
    turned = regions.permute(regions.identity_regions("s", (5, 200)), (1, 0))
    with pytest.raises(regions.TooManyRegions):
        regions.reshape(turned, (200, 5), (1000,))
