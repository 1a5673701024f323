"""Check early that the Trainer can build the optimizer, the schedule and the report callbacks.

The Trainer builds them after loading the model, and fails then if a package is not installed, a setting is missing, or a number
is out of range. This module builds them once for a single parameter and discards them, so that errors appear before anything is
read. transformers' own code decides what is valid.

Left out: whether an optimizer can train under ZeRO-3 (`names.REFUSED_OPTIMIZERS` lists those that can't).
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from zero_sft.errors import ArgumentError

_STEPS = 100
"""Arbitrary number of steps for the discarded schedule."""

_NO_KWARGS = ("constant", "constant_with_warmup")
"""Schedules to which transformers passes no --lr_scheduler_kwargs."""

_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
"""Metrics that an evaluation returns, one of which can select the best model."""


def dry_run(arguments: Any) -> None:
    """Raise one `ArgumentError` that lists what the Trainer's arguments can't build. Every rank; does not communicate."""
    problems = [*_report_problems(arguments), *_liger_problems(arguments), *_checkpointing_problems(arguments)]
    problems += [*_optimizer_problems(arguments), *_loader_problems(arguments), *_best_model_problems(arguments)]
    problems += _number_problems(arguments)
    if problems:
        raise ArgumentError.listing(problems, "the arguments can't be used:", code="arguments.unusable")


def _report_problems(arguments: Any) -> list[ArgumentError]:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    problems = []
    for name in arguments.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:  # noqa: BLE001 - each integration raises different types
            problems.append(
                ArgumentError(f"--report_to {name} can't be used: {_reason(error)}", code="arguments.report_to_unusable")
            )
    return problems


def _liger_problems(arguments: Any) -> list[ArgumentError]:
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        return [
            ArgumentError(
                "--use_liger_kernel needs a package that isn't installed: pip install liger-kernel",
                code="arguments.package_missing",
            )
        ]
    return []


def _checkpointing_problems(arguments: Any) -> list[ArgumentError]:
    """Check the keys, which would raise a TypeError in the first step if unknown, and the flags, where text counts as true."""
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or name == "use_reentrant"
    }
    known_keys = [*parameters, "every_n_layers", "offload", "selective"]
    settings = arguments.activation_checkpointing_kwargs or {}
    flags = {"use_reentrant", "offload", "selective", *(name for name, value in parameters.items() if isinstance(value, bool))}
    return [
        ArgumentError(
            f"--activation_checkpointing_kwargs has {name} = {value!r}; expected true or false", code="arguments.wrong_value"
        )
        for name, value in settings.items()
        if name in flags and not isinstance(value, bool)
    ] + [
        ArgumentError(
            f"--activation_checkpointing_kwargs has the unknown key {name!r}; known: {', '.join(sorted(set(known_keys)))}",
            code="arguments.unknown_key",
        )
        for name in settings
        if name not in known_keys
    ]


def _optimizer_problems(arguments: Any) -> list[ArgumentError]:
    """Build the optimizer that --optim names, and the schedule, for one parameter."""
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    def build_optimizer() -> torch.optim.Optimizer:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return optimizer_class([torch.nn.Parameter(torch.zeros(2))], **settings)

    config = arguments.hf_deepspeed_config.config
    optimizer, problems = None, []
    if "optimizer" not in config:
        optimizer, problems = _try(build_optimizer, f"--optim {arguments.optim.value}")
    if "scheduler" in config:
        return problems
    kind, settings = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    if settings and kind in _NO_KWARGS:
        problems.append(
            ArgumentError(
                f"--lr_scheduler_kwargs {settings} does nothing with --lr_scheduler_type {kind}: leave it out",
                code="arguments.no_effect",
            )
        )
    base = optimizer or torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    _, schedule_problems = _try(
        lambda: get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=base,
            num_warmup_steps=arguments.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=settings,
        ),
        f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings}",
    )
    return problems + schedule_problems


def _loader_problems(arguments: Any) -> list[ArgumentError]:
    """Build a DataLoader, which checks its settings on construction and starts no process before it is iterated."""
    _, problems = _try(
        lambda: torch.utils.data.DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        ),
        "the arguments --dataloader_*",
    )
    return problems


def _best_model_problems(arguments: Any) -> list[ArgumentError]:
    """Check the metric and the checkpoints for the best model, before the first evaluation fails hours later."""
    problems = []
    metric = arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in _METRICS:
        names = ", ".join(_METRICS)
        problems.append(
            ArgumentError(
                f"--metric_for_best_model {metric}: an evaluation of this job returns {names}, each with or without eval_",
                code="arguments.unknown_metric",
            )
        )
    if arguments.save_only_model and arguments.load_best_model_at_end:
        problems.append(
            ArgumentError(
                "--load_best_model_at_end needs whole checkpoints under DeepSpeed: leave --save_only_model out",
                code="arguments.needs_whole_checkpoints",
            )
        )
    return problems


_BOUNDS = {
    "seed": (0, 2**32, "at least 0 and below 2**32"),
    "data_seed": (0, 2**32, "at least 0 and below 2**32"),
    "weight_decay": (0, math.inf, "at least 0"),
    "label_smoothing_factor": (0, 1, "at least 0 and below 1"),
    "max_grad_norm": (0, math.inf, "at least 0, which means no clipping"),
    "neftune_noise_alpha": (0, math.inf, "at least 0"),
    "pad_to_multiple_of": (1, math.inf, "at least 1"),
}
"""Half-open range [start, stop) of numbers that the Trainer does not check, and the range in words."""


def _number_problems(arguments: Any) -> list[ArgumentError]:
    values = {name: getattr(arguments, name) for name in _BOUNDS}
    return [
        ArgumentError(f"--{name} must be {_BOUNDS[name][2]}; got {value}", code="arguments.out_of_range")
        for name, value in values.items()
        if value is not None and (value < _BOUNDS[name][0] or value >= _BOUNDS[name][1])
    ]


def _try(make: Callable[[], Any], what: str) -> tuple[Any, list[ArgumentError]]:
    try:
        return make(), []
    except Exception as error:  # noqa: BLE001 - optimizers and schedules raise ValueError, TypeError, ImportError and others
        return None, [ArgumentError(f"{what} can't be used: {_reason(error)}", code="arguments.unusable_value")]


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
