"""The parameters that a run trains, and with which learning rate: `--unfreeze` and `--learning_rates`, by patterns of names."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from zero_sft.adapters.options import LoraOptions
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta
from zero_sft.printable import first_of

logger = logging.getLogger("zero_sft.train")


def require_matches(arguments: Any, lora: LoraOptions, spec: ModelSpec, world: World) -> None:
    """Check that each pattern fits a parameter, before the weights are read. Every rank; communicates.

    Raises:
        ArgumentError: a pattern fits none.
    """
    rates = arguments.learning_rates or {}
    if arguments.unfreeze is None and not rates:
        return
    with collective_stage(world, "looking for the parameters to train"):
        if world.is_main:
            names = list(_trained_names(spec, lora))
            if arguments.unfreeze is not None:
                names = _fitting(arguments.unfreeze, names, "--unfreeze")
            for pattern in rates:
                _fitting(pattern, names, "--learning_rates")


def _trained_names(spec: ModelSpec, lora: LoraOptions) -> Iterator[str]:
    """Yield the names of the parameters that are trained without `--unfreeze`."""
    model: Any = build_on_meta(spec)[0]
    if lora.enabled:
        from zero_sft.adapters.attach import adapted_on_meta, lora_config

        model = adapted_on_meta(model, lora_config(lora))
    return (name for name, param in model.named_parameters() if param.requires_grad)


def _fitting(pattern: str, names: Iterable[str], option: str) -> list[str]:
    names = list(names)
    fitting = [name for name in names if re.search(pattern, name)]
    if not fitting:
        raise ArgumentError(
            f"{option}: the pattern {pattern!r} fits the name of no trained parameter, such as {first_of(names, 3)}.",
            code="arguments.pattern_fits_nothing",
        )
    return fitting


def freeze_others(model: Any, pattern: str) -> None:
    """Freeze all parameters whose names the pattern does not fit. Any rank; does not communicate."""
    total = trained = 0
    for name, param in model.named_parameters():
        total += 1
        param.requires_grad_(param.requires_grad and re.search(pattern, name) is not None)
        trained += param.requires_grad
    model.enable_input_require_grads()  # for activation checkpointing, where the embeddings are frozen
    logger.info("%d of %d parameters are trained, all others are frozen", trained, total)


def set_rates(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Any]], rates: Mapping[str, float]) -> None:
    """Give parameters their own base rate: that of the first pattern that fits. Pure, apart from the optimizer's groups.

    Args:
        named: the parameters by name.
    """
    names = {id(param): name for name, param in named}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for param in group["params"]:
            name = names[id(param)]
            rate = next((rate for pattern, rate in rates.items() if re.search(pattern, name)), group["lr"])
            parts.setdefault(rate, []).append(param)
        groups += [{**group, "params": params, "lr": rate} for rate, params in parts.items()]
    optimizer.param_groups[:] = groups
