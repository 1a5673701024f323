"""The parameters that a run trains, and with which learning rate: `--unfreeze` and `--learning_rates`, by patterns of names."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from zero_sft.adapters.options import LoraOptions
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta
from zero_sft.printable import first_of, with_count
from zero_sft.transformers_internals import tied_names

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
            model: Any = build_on_meta(spec)[0]
            tied = tied_names(model)
            names = [name for name in _trained_names(model, lora) if name not in tied]
            if arguments.unfreeze is not None:
                names = _fitting(arguments.unfreeze, names, "--unfreeze", tied)
            for pattern in rates:
                _fitting(pattern, names, "--learning_rates", tied)


def _trained_names(model: Any, lora: LoraOptions) -> Iterator[str]:
    """Yield the names of the parameters that are trained without `--unfreeze`; adds the adapters to the model."""
    if lora.enabled:
        from zero_sft.adapters.attach import adapted_on_meta, lora_config

        model = adapted_on_meta(model, lora_config(lora))
    return (name for name, param in model.named_parameters() if param.requires_grad)


def _fitting(pattern: str, names: Sequence[str], option: str, tied: Mapping[str, str]) -> list[str]:
    """Return the names that a pattern fits; raise `ArgumentError` if it fits none.

    Args:
        tied: for the names of parameters that are tied to others, the names under which these are trained.
    """
    fitting = [name for name in names if re.search(pattern, name)]
    alias = next((name for name in tied if re.search(pattern, name)), None)
    if not fitting and alias is not None:
        raise ArgumentError(
            f"{option}: the pattern {pattern!r} fits {alias} alone, whose weight is tied to {tied[alias]} and trained under "
            "that name. Fit that name.",
            code="arguments.pattern_fits_nothing",
        )
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
    """Give parameters their own base rate: that of the first pattern that fits. Changes the optimizer's groups.

    Groups with the optimizer's usual rate come first: the Trainer logs the rate of the first group.

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
    usual = {group["lr"] for group in optimizer.param_groups}
    groups.sort(key=lambda group: group["lr"] not in usual)
    optimizer.param_groups[:] = groups
    numbers = Counter({group["lr"]: 0 for group in groups})
    for group in groups:
        numbers[group["lr"]] += len(group["params"])
    described = ", ".join(f"{rate:g} of {with_count(count, 'parameter')}" for rate, count in numbers.items())
    logger.info("learning rates: %s", described)
