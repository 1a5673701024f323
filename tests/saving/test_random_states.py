"""Random generators go on where they were."""

import random

import numpy as np
import pytest
import torch

from zero_sft.saving.random_states import random_states, restore_random_states


def draw() -> list[float]:
    numbers = [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.rand(()))]
    return [*numbers, *torch.randn(17).tolist(), *np.random.permutation(9).tolist(), float(random.sample(range(99), 1)[0])]


@pytest.mark.parametrize("drawn", range(3))
def test_the_numbers_that_follow_are_the_same(drawn):
    """Both generators of Gaussian numbers keep the second one of a pair."""
    for _ in range(drawn):
        draw()
    saved = {name: state.clone() for name, state in random_states().items()}
    expected = [draw() for _ in range(3)]
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    draw()
    restore_random_states(saved)
    assert [draw() for _ in range(3)] == expected
    assert all(state.device.type == "cpu" for state in saved.values())
