"""The states of a rank's random generators as tensors: Python's, numpy's, torch's on the host and on the rank's device."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

_NUMPY_KEYS = 624


def random_states() -> dict[str, torch.Tensor]:
    """Return the present states, as host tensors by name. Any rank; does not communicate."""
    version, python_keys, python_gauss = random.getstate()
    _, numpy_keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *python_keys], dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, numpy_keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        states["device"] = accelerator.get_rng_state().cpu()
    return states


def restore_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to states that `random_states` returned; the device's only if this rank has a device too."""
    version, *python_keys = states["python"].tolist()
    random.setstate((version, tuple(python_keys), next(iter(states["python_gauss"].tolist()), None)))
    numpy_state = states["numpy"].tolist()
    keys, (position, has_gauss) = np.array(numpy_state[:_NUMPY_KEYS], dtype=np.uint32), numpy_state[_NUMPY_KEYS:]
    numpy_gauss = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", keys, position, has_gauss, numpy_gauss))
    torch.random.set_rng_state(states["torch"])
    accelerator: Any = get_accelerator()
    if "device" in states and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(states["device"])
