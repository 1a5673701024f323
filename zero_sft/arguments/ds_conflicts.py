"""Prepare a DeepSpeed config for the arguments, and list contradictions between the two.

Both describe the same run. transformers compares them only when the engine starts, after loading the weights, and only for
keys that the config has. If a key is absent (`gradient_clipping`, `optimizer.params.lr`), DeepSpeed uses its default and the
argument has no effect. So this module sets absent keys to "auto", which the Trainer fills from the arguments, and compares
everything else at the start.

All public functions are pure. Not checked here: keys of DeepSpeed without a corresponding argument (see `zero/ds_schema.py`).
"""

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from zero_sft.ds_config import ADAMW_OPTIMS
from zero_sft.errors import ConfigError
from zero_sft.printable import with_count

_DECIDED_BY_ARGUMENTS = (
    "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
_OPTIMIZER_PARAMS = {
    **dict.fromkeys(("adam", "adamw", "lamb"), ("lr", "betas", "eps", "weight_decay")),
    "lion": ("lr", "betas", "weight_decay"),
}
"""Parameters of an optimizer that arguments set, by its type in the config; others have `lr` and `weight_decay`."""
_EQUIVALENT_OPTIMS: dict[str, Set[str]] = {"adam": ADAMW_OPTIMS, "adamw": ADAMW_OPTIMS, "lion": {"lion_32bit"}}
"""Values of --optim by the type in the config, where the names differ."""
_SCHEDULER_PARAMS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
_EQUIVALENT_SCHEDULES = {
    "WarmupLR": ("constant_with_warmup",),
    "WarmupDecayLR": ("linear",),
    "WarmupCosineLR": ("cosine", "cosine_with_min_lr"),
}
_FILLED = frozenset({
    *_DECIDED_BY_ARGUMENTS, "bf16.enabled", "fp16.enabled", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.zero_hpz_partition_size", "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "steps_per_print",
})  # fmt: skip
"""Keys whose "auto" the Trainer, accelerate (the last two) or this package replaces, without optimizer and scheduler."""


def find_unfilled_auto(config: Mapping[str, Any], scheduler_params: Iterable[str] = ()) -> list[ConfigError]:
    """Return an error for each "auto" of a completed config that nothing replaces; accelerate refuses it after the load.

    The parameters are those of `with_auto_for_absent_keys`.
    """
    optimizer, scheduler_params = config.get("optimizer"), set(scheduler_params)
    kind = str(optimizer.get("type")).lower() if isinstance(optimizer, Mapping) else ""
    filled = {*_FILLED, *(f"optimizer.params.{name}" for name in _OPTIMIZER_PARAMS.get(kind, _OPTIMIZER_PARAMS["adam"]))}
    filled |= {f"scheduler.params.{name}" for name in _SCHEDULER_PARAMS if name in scheduler_params or not scheduler_params}
    problems = []
    for key in _auto_keys(config):
        if key not in filled:
            near = difflib.get_close_matches(key, filled, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(
                ConfigError(
                    f'{key} is "auto", but nothing in the job sets this key.{hint} Write a value, or remove the key for '
                    "DeepSpeed's default.",
                    code="ds_config.auto_not_filled",
                )
            )
    return problems


def _auto_keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config whose value is "auto", with the names of their sections: "bf16.enabled"."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"


def with_auto_for_absent_keys(
    config: Mapping[str, Any], optim: str, scheduler_params: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Set absent keys to "auto", so that the arguments fill them. Return the config, and log lines about what it overrides.

    Args:
        config: the result of `load_ds_config`.
        optim: the value of --optim.
        scheduler_params: the parameters of the scheduler class that the config names.
    """
    result, notes = copy.deepcopy(dict(config)), []
    for section in ("optimizer", "scheduler"):
        if section in result and result[section] is None:
            del result[section]  # transformers treats null as a present section
    for key in _DECIDED_BY_ARGUMENTS:
        if result.get(key) is None:
            result[key] = "auto"
    for section in ("bf16", "fp16"):
        result.setdefault(section, {"enabled": "auto"})
    optimizer, scheduler = result.get("optimizer"), result.get("scheduler")
    if isinstance(optimizer, dict):
        kind = optimizer.get("type")
        _add_auto_params(optimizer, _OPTIMIZER_PARAMS.get(str(kind).lower(), ("lr", "weight_decay")))
        notes.append(f"the optimizer is {kind}, from the DeepSpeed config's section; --optim has no effect")
    elif optimizer is None:
        notes += _prevent_replacement(result, optim)
    if isinstance(scheduler, dict):
        _add_auto_params(scheduler, set(_SCHEDULER_PARAMS) & set(scheduler_params))
        notes.append(f"the schedule is {scheduler.get('type')}, from the DeepSpeed config; --lr_scheduler_type has no effect")
    return result, notes


def _add_auto_params(section: dict[str, Any], names: Iterable[str]) -> None:
    """Set absent parameters of a section to "auto", in place; `zero/ds_schema.py` refuses `params` that are not a mapping."""
    params = section.get("params") or {}
    if isinstance(params, dict):
        section["params"] = dict.fromkeys(names, "auto") | params


def _prevent_replacement(config: dict[str, Any], optim: str) -> list[str]:
    """Stop accelerate from replacing the optimizer with DeepSpeed's CPU Adam under offload; return log lines."""
    if not offloads_optimizer(config):
        return []
    if config.get("zero_force_ds_cpu_optimizer") is None and optim not in ADAMW_OPTIMS:
        config["zero_force_ds_cpu_optimizer"] = False
    if config.get("zero_force_ds_cpu_optimizer", True) and optim in ADAMW_OPTIMS:
        return [f"--optim {optim} runs as DeepSpeed's CPU Adam (AdamW): zero_force_ds_cpu_optimizer is on in the config"]
    if optim == "adamw_torch":
        return ["the optimizer runs on the host: --optim adamw_torch_fused is several times as fast there"]
    return []


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """True if the optimizer's states are on the host or on NVMe."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    return isinstance(offload, Mapping) and offload.get("device", "none") != "none"


def find_contradictions(config: Mapping[str, Any], arguments: Any, given: Set[str]) -> list[ConfigError]:
    """Return an error for each value of the config that the arguments contradict.

    Args:
        config: the result of `with_auto_for_absent_keys`, before the Trainer fills "auto".
        arguments: the Trainer's arguments.
        given: the names of the arguments that the user gave.
    """
    optimizer, scheduler = config.get("optimizer"), config.get("scheduler")
    problems = [*_contradictions(config, _comparable_values(arguments), given)]
    if isinstance(optimizer, Mapping) and "optim" in given:
        problems += _other_optimizer(str(optimizer.get("type")), str(arguments.optim.value))
    elif optimizer is None:
        problems += _replaced_optimizer(config, str(arguments.optim.value))
    if isinstance(scheduler, Mapping):
        problems += _other_schedule(str(scheduler.get("type")), str(arguments.lr_scheduler_type.value), given)
    return problems


def find_schedule_contradictions(config: Mapping[str, Any], arguments: Any, steps: int, given: Set[str]) -> list[ConfigError]:
    """Return contradictions that depend on the number of optimizer steps, which is known once the data is prepared."""
    values = {
        "scheduler.params.total_num_steps": (steps, "this run's number of optimizer steps"),
        "scheduler.params.warmup_num_steps": (max(1, arguments.get_warmup_steps(steps)), "--warmup_steps"),
    }
    return [*_contradictions(config, values, given)]


def contradiction_error(problems: Sequence[ConfigError], where: str) -> ConfigError:
    """Make one error that lists all contradictions between a DeepSpeed config and the arguments."""
    heading = f"the DeepSpeed config {where} and the arguments contradict each other:"
    remedy = 'Write "auto" for a value that an argument sets, or change one of the two; docs/configs.md explains the keys.'
    return ConfigError.listing(problems, heading, remedy=remedy, code="ds_config.contradictions")


def count_steps(rows: int, arguments: Any, world_size: int) -> int:
    """Return the number of optimizer steps of a run on `rows` rows, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * steps_in_epoch(rows, arguments, world_size))


def steps_in_epoch(rows: int, arguments: Any, world_size: int) -> int:
    """Return the number of optimizer steps of an epoch on `rows` rows, as the Trainer counts them."""
    round_batches = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = round_batches(round_batches(rows / arguments.per_device_train_batch_size) / world_size)
    return max(1, math.ceil(batches / arguments.gradient_accumulation_steps))


def _comparable_values(args: Any) -> dict[str, tuple[Any, str]]:
    """Return (value, arguments that set it) by the key of the config that sets the same."""
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    ranks = with_count(args.world_size, "rank")
    batch_product = f"{ranks} × --per_device_train_batch_size {micro} × --gradient_accumulation_steps {accumulation}"
    return {
        "train_micro_batch_size_per_gpu": (micro, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
        "train_batch_size": (args.world_size * micro * accumulation, batch_product),
        "gradient_clipping": (args.max_grad_norm, "--max_grad_norm"),
        "bf16.enabled": (bool(args.bf16 or args.bf16_full_eval), "--bf16"),
        "fp16.enabled": (bool(args.fp16 or args.fp16_full_eval), "--fp16"),
        "optimizer.params.lr": (args.learning_rate, "--learning_rate"),
        "optimizer.params.betas": ([args.adam_beta1, args.adam_beta2], "--adam_beta1, --adam_beta2"),
        "optimizer.params.eps": (args.adam_epsilon, "--adam_epsilon"),
        "optimizer.params.weight_decay": (args.weight_decay, "--weight_decay"),
        "scheduler.params.warmup_max_lr": (args.learning_rate, "--learning_rate"),
    }


def _contradictions(config: Mapping[str, Any], values: Mapping[str, tuple[Any, str]], given: Set[str]) -> Iterator[ConfigError]:
    for key, (expected, argument) in values.items():
        found: Any = config
        for name in key.split("."):
            found = (found or {}).get(name)
        if found in (None, "auto") or (found == expected and isinstance(found, bool) == isinstance(expected, bool)):
            continue
        by_default = "" if any(name in given for name in re.findall(r"--(\w+)", argument)) else ", by default"
        yield ConfigError(
            f"{key} is {found!r}, but the arguments say {expected!r} ({argument}{by_default}).",
            code="ds_config.contradicts_argument",
        )


def _other_optimizer(kind: str, optim: str) -> Iterator[ConfigError]:
    if optim not in _EQUIVALENT_OPTIMS.get(kind.lower(), {kind.lower()}):
        yield ConfigError(
            f"optimizer.type is {kind!r}, but --optim is {optim!r}. Remove the section `optimizer` from the config, or leave "
            "--optim out.",
            code="ds_config.other_optimizer",
        )


def _replaced_optimizer(config: Mapping[str, Any], optim: str) -> Iterator[ConfigError]:
    if optim in ADAMW_OPTIMS or not offloads_optimizer(config):
        return
    zero = config["zero_optimization"]
    if config.get("zero_force_ds_cpu_optimizer", True):
        yield ConfigError(
            f"zero_force_ds_cpu_optimizer is true, so DeepSpeed's CPU Adam would run instead of --optim {optim}. Set false.",
            code="ds_config.other_optimizer",
        )
    for key, is_on in (
        ("offload_optimizer.super_offload", zero["offload_optimizer"].get("super_offload")),
        ("zenflow", zero.get("zenflow")),
    ):
        if is_on:
            yield ConfigError(
                f"zero_optimization.{key} supports only Adam, but --optim is {optim!r}.", code="ds_config.other_optimizer"
            )


def _other_schedule(kind: str, schedule: str, given: Set[str]) -> Iterator[ConfigError]:
    if "lr_scheduler_type" in given and schedule not in _EQUIVALENT_SCHEDULES.get(kind, ()):
        yield ConfigError(
            f"scheduler.type is {kind!r}, but --lr_scheduler_type is {schedule!r}. "
            "Remove the section `scheduler` from the config, or leave --lr_scheduler_type out.",
            code="ds_config.other_schedule",
        )
    ignored = ("lr_scheduler_kwargs",) if kind in _EQUIVALENT_SCHEDULES else ("warmup_steps", "lr_scheduler_kwargs")
    for name in ignored:
        if name in given:
            yield ConfigError(
                f"scheduler.type is {kind!r}, which ignores --{name}. Remove the section `scheduler` from the config, or the "
                "argument.",
                code="ds_config.other_schedule",
            )
