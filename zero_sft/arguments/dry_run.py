"""Rehearse what the Trainer builds from its arguments: the optimizer, the schedule and the report callbacks.

The Trainer builds them after loading the model, and fails then if a package is not installed, a setting is missing, or a number
is out of range. This module builds them once for a single parameter and discards them, so that errors appear before anything is
read. transformers' own code decides what is valid.

Not checked here: whether an optimizer can train under ZeRO-3 (`REFUSED_OPTIMIZERS` lists those that can't).
"""

import copy
import importlib.util
import inspect
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from zero_sft.arguments.names import refused_accelerator_keys
from zero_sft.errors import ArgumentError

_STEPS = 100
"""Arbitrary number of steps for the discarded schedule."""

_NO_KWARGS = ("constant", "constant_with_warmup")
"""Schedules to which transformers passes no --lr_scheduler_kwargs."""

_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
"""Metrics that an evaluation returns, one of which can select the best model."""


def dry_run(arguments: Any) -> None:
    """Raise one `ArgumentError` that lists what the Trainer's arguments can't build. Every rank; does not communicate."""
    checks = (
        _report_problems, _liger_problems, _accelerator_problems, _checkpointing_problems, _optimizer_problems,
        _optim_args_problems, _loader_problems, _metric_problems, _number_problems,
    )  # fmt: skip
    problems = [problem for check in checks for problem in check(arguments)]
    if problems:
        raise ArgumentError.listing(problems, "the arguments can't be used:", code="arguments.unusable")


def _report_problems(arguments: Any) -> Iterator[ArgumentError]:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in arguments.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:  # noqa: BLE001 - each integration raises different types
            yield ArgumentError(f"--report_to {name} can't be used: {_reason(error)}", code="arguments.report_to_unusable")


def _liger_problems(arguments: Any) -> Iterator[ArgumentError]:
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        yield ArgumentError(
            "--use_liger_kernel needs a package that isn't installed: pip install liger-kernel",
            code="arguments.package_missing",
        )


def _accelerator_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Check accelerate's settings, which `parse` has not seen if they come from a file."""
    return refused_accelerator_keys(vars(arguments.accelerator_config))


def _checkpointing_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Check the keys and the flags.

    An unknown key would raise a TypeError in the first step. Any text as a flag, even "false", would count as true.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    flags = {"use_reentrant", "offload", "selective", *(name for name, value in defaults.items() if isinstance(value, bool))}
    known_keys = {*defaults, *flags, "every_n_layers"}
    for name, value in (arguments.activation_checkpointing_kwargs or {}).items():
        if name not in known_keys:
            yield ArgumentError(
                f"--activation_checkpointing_kwargs has the unknown key {name!r}; known: {', '.join(sorted(known_keys))}",
                code="arguments.unknown_key",
            )
        elif name in flags and not isinstance(value, bool):
            yield ArgumentError(
                f"--activation_checkpointing_kwargs has {name} = {value!r}; expected true or false",
                code="arguments.wrong_value",
            )


def _optimizer_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Build the optimizer that --optim names, and the schedule, for one parameter."""
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    config = arguments.hf_deepspeed_config.config
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)  # a schedule needs one, even if that of --optim can't be built
    if "optimizer" not in config:
        try:
            optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer = optimizer_class([parameter], **settings)
        except Exception as error:  # noqa: BLE001 - each optimizer raises different types
            yield _unusable(f"--optim {arguments.optim.value}", error)
    if "scheduler" in config:
        return
    kind, settings = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    if settings and kind in _NO_KWARGS:
        yield ArgumentError(
            f"--lr_scheduler_kwargs {settings} does nothing with --lr_scheduler_type {kind}: leave it out",
            code="arguments.no_effect",
        )
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=settings,
        )
    except Exception as error:  # noqa: BLE001 - each schedule raises different types
        yield _unusable(f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings}", error)


def _optim_args_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Find keys of --optim_args that the optimizer does not read, which transformers ignores silently.

    A key is read if it makes a difference: a value that can't be right is passed on, or raises an error.
    """
    if arguments.learning_rates and "optimizer" in arguments.hf_deepspeed_config.config:
        yield ArgumentError(
            "--learning_rates does nothing with the section `optimizer` of the DeepSpeed config: leave one of the two out",
            code="arguments.no_effect",
        )
    pairs = [pair.split("=", 1) for pair in (arguments.optim_args or "").replace(" ", "").split(",") if "=" in pair]
    optim = arguments.optim.value
    if pairs and "optimizer" in arguments.hf_deepspeed_config.config:
        yield ArgumentError(
            f"--optim_args {arguments.optim_args} does nothing with the section `optimizer` of the DeepSpeed config: write the "
            "settings there, or leave it out",
            code="arguments.no_effect",
        )
        return
    for key, _ in pairs:
        others = [f"{name}={value}" for name, value in pairs if name != key]
        without = _optimizer_settings(arguments, others)
        if without is not None and without == _optimizer_settings(arguments, [*others, f"{key}=?"]):
            yield ArgumentError(
                f"--optim_args {arguments.optim_args}: {key} does nothing with --optim {optim}, which does not read it: leave "
                "it out",
                code="arguments.no_effect",
            )


def _optimizer_settings(arguments: Any, pairs: list[str]) -> Any:
    """Return the optimizer class and settings that the Trainer makes of these --optim_args; None if it raises an error."""
    from transformers import Trainer

    changed = copy.copy(arguments)
    changed.optim_args = ",".join(pairs)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(changed)
    except Exception:  # noqa: BLE001 - each optimizer raises different types; _optimizer_problems reports them
        return None


def _loader_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Build a DataLoader, which checks its settings on construction and starts no process before it is iterated."""
    names = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    settings: dict[str, Any] = {name: getattr(arguments, f"dataloader_{name}") for name in names}
    try:
        torch.utils.data.DataLoader([0], **settings)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - torch raises ValueError, TypeError and others
        yield _unusable("the arguments --dataloader_*", error)


def _metric_problems(arguments: Any) -> Iterator[ArgumentError]:
    """Check the metric that chooses the best model, before the first evaluation fails hours later."""
    metric = arguments.metric_for_best_model
    if metric is not None and not metric.removeprefix("eval_").endswith(_METRICS):  # the job checks the names of sets
        names = ", ".join(_METRICS)
        yield ArgumentError(
            f"--metric_for_best_model {metric}: an evaluation of this job returns {names}, each with or without eval_",
            code="arguments.unknown_metric",
        )


def require_metric_of_sets(metric: str | None, sets: Collection[str]) -> None:
    """Raise `ArgumentError` if the metric that chooses the best model is that of a set which is not evaluated. Pure.

    Args:
        sets: the names of the sets in `--eval_data_path`; "" for one without a name.
    """
    name = (metric or "").removeprefix("eval_")
    of_set = next((name.removesuffix(f"_{end}") for end in _METRICS if name.endswith(f"_{end}")), "")
    if name not in _METRICS and of_set and of_set not in sets:
        known = ", ".join(["loss", *(f"{each}_loss" for each in sets if each)])
        raise ArgumentError(
            f"--metric_for_best_model {metric}: --eval_data_path has no set {of_set}; expected {known}.",
            code="arguments.unknown_metric",
        )


_BOUNDS = {
    "seed": (0, 2**32, "at least 0 and below 2**32"),
    "data_seed": (0, 2**32, "at least 0 and below 2**32"),
    "weight_decay": (0, math.inf, "at least 0"),
    "label_smoothing_factor": (0, 1, "at least 0 and below 1"),
    "max_grad_norm": (0, math.inf, "at least 0, which means no clipping"),
    "neftune_noise_alpha": (0, math.inf, "at least 0"),
    "eval_delay": (0, math.inf, "at least 0"),
    "router_aux_loss_coef": (0, math.inf, "at least 0"),
    "pad_to_multiple_of": (1, math.inf, "at least 1"),
}
"""Half-open range [start, stop) of numbers that the Trainer does not check, and the range in words.

They are checked on the Trainer's arguments, where a value may also come from a default. `parse` checks the numbers without
which the Trainer's arguments can't be built.
"""


def _number_problems(arguments: Any) -> Iterator[ArgumentError]:
    for name, (start, stop, words) in _BOUNDS.items():
        value = getattr(arguments, name)
        if value is not None and (value < start or value >= stop):
            yield ArgumentError(f"--{name} must be {words}; got {value}", code="arguments.out_of_range")


def _unusable(argument: str, error: Exception) -> ArgumentError:
    return ArgumentError(f"{argument} can't be used: {_reason(error)}", code="arguments.unusable_value")


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
