"""Build at the start what the Trainer builds later: optimizer, schedule, report callbacks; and refuse what can't be built.

The Trainer makes these after the model is loaded, and each fails there in its own way: a package that isn't installed, a
setting that is missing, a number out of range. Here they are made once for a single parameter and thrown away, so that the
errors come before anything is read. transformers decides; this module only asks it.

Left out: whether an optimizer can train under ZeRO-3 (`names.REFUSED_OPTIMIZERS` lists those that can't).
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from zero_sft.errors import ArgumentError

_STEPS = 100
"""A number of steps for the schedule that is only tried."""

_NO_KWARGS = ("constant", "constant_with_warmup")
"""Schedules to which transformers passes no --lr_scheduler_kwargs."""

_LOSSES = ("nll", "dft")


def dry_run(arguments: Any) -> None:
    """Raise one `ArgumentError` for everything in the Trainer's arguments that can't be built. Does not communicate."""
    problems = [*_report_problems(arguments), *_liger_problems(arguments), *_checkpointing_problems(arguments)]
    problems += _optimizer_problems(arguments)
    if arguments.loss_type not in _LOSSES:
        problems.append(f"--loss_type {arguments.loss_type}: expected one of {', '.join(_LOSSES)}")
    if problems:
        raise ArgumentError("\n".join(["the arguments can't be used:", *problems] if len(problems) > 1 else problems))


def _report_problems(arguments: Any) -> list[str]:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    problems = []
    for name in arguments.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:  # noqa: BLE001 - each integration has its own
            problems.append(f"--report_to {name} can't be used: {_reason(error)}")
    return problems


def _liger_problems(arguments: Any) -> list[str]:
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        return ["--use_liger_kernel needs a package that isn't installed: pip install liger-kernel"]
    return []


def _checkpointing_problems(arguments: Any) -> list[str]:
    """Unknown keys would end the first step, in a TypeError inside the model."""
    known = [
        name
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or name == "use_reentrant"
    ] + ["every_n_layers", "offload", "selective"]
    given = arguments.activation_checkpointing_kwargs or {}
    return [
        f"--activation_checkpointing_kwargs has the unknown key {name!r}; known: {', '.join(sorted(set(known)))}"
        for name in given
        if name not in known
    ]


def _optimizer_problems(arguments: Any) -> list[str]:
    """Make the optimizer that --optim names, and the schedule, for one parameter."""
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    def optimizer() -> torch.optim.Optimizer:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return made([torch.nn.Parameter(torch.zeros(2))], **settings)

    config = arguments.hf_deepspeed_config.config
    has_own = "optimizer" in config
    made, problem = (None, "") if has_own else _tried(optimizer, f"--optim {arguments.optim.value}")
    problems = [problem] if problem else []
    if "scheduler" in config:
        return problems
    kind, settings = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    if settings and kind in _NO_KWARGS:
        problems.append(f"--lr_scheduler_kwargs {settings} does nothing with --lr_scheduler_type {kind}: leave it out")
    base = made or torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    _, problem = _tried(
        lambda: get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=base,
            num_warmup_steps=arguments.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=settings,
        ),
        f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings}",
    )
    return problems + ([problem] if problem else [])


def _tried(make: Callable[[], Any], what: str) -> tuple[Any, str]:
    try:
        return make(), ""
    except Exception as error:  # noqa: BLE001 - optimizers and schedules raise ValueError, TypeError, ImportError and others
        return None, f"{what} can't be used: {_reason(error)}"


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
