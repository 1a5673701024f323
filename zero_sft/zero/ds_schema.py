"""Check a DeepSpeed config with DeepSpeed's parser, before anything is read.

DeepSpeed validates its config only when the engine starts, after the weights are loaded, and every rank prints a traceback.
Here DeepSpeed's parser runs at the start, section by section, so all problems are listed at once. DeepSpeed ignores unknown
keys outside of its pydantic models. They are refused here, because a misspelt key has no effect.

Features that this package does not train with are in `ds_features`.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import pydantic
import torch

from zero_sft.ds_features import contradictions, refused_features
from zero_sft.errors import ConfigError
from zero_sft.zero.ds_classes import optimizer_class, parameter_names, scheduler_class

SECTIONS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor",
    "data_efficiency", "data_types", "datastates_ckpt", "expert_parallel", "flops_profiler", "fp16", "hybrid_engine",
    "optimizer", "pipeline", "scheduler", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "wandb",
    "weight_quantization", "zero_optimization",
})  # fmt: skip
FLAGS = frozenset({
    "disable_allgather", "disable_python_gc", "dump_state", "dataloader_drop_last", "managed_gradient_accumulation",
    "memory_breakdown", "prescale_gradients", "use_data_before_expert_parallelism", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})  # fmt: skip
NUMBERS = frozenset({
    "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "sequence_parallel_size",
    "steps_per_print", "train_batch_size", "train_micro_batch_size_per_gpu", "vocabulary_size",
})  # fmt: skip
TEXTS = frozenset({"communication_data_type", "gradient_allreduce_op", "log_level", "seq_parallel_communication_data_type"})

NOTES = frozenset({"$schema", "comment", "_comment", "//"})
"""Keys that people use for comments. They have no effect."""

_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
_OPTIMIZER_SECTION = ("type", "params", "legacy_fusion")
_SCHEDULER_SECTION = ("type", "params")


def schema_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    """List the parts of a stage-3 config without "auto" that DeepSpeed refuses or ignores, one error each.

    Any rank; does not communicate. The batch sizes are not compared with the number of ranks.
    """
    known_keys = SECTIONS | FLAGS | NUMBERS | TEXTS | NOTES | _removed()
    problems = [_unknown(key, known_keys) for key in config if key not in known_keys]
    settings = {key: value for key, value in config.items() if key in known_keys - NOTES}
    for key, value in settings.items():
        problems += _wrong_type(key, value) or _section_problems(key, value)
    if not problems:
        problems = [*_monitor_problems(settings), *_optimizer_problems(settings), *_scheduler_problems(settings)]
        problems += [
            *_nvme_problems(settings["zero_optimization"]),
            *_dtype_problems(settings),
            *refused_features(settings),
            *contradictions(settings),
        ]
    return problems


def _removed() -> set[str]:
    """Return the keys that DeepSpeed has removed. Its parser explains the replacement of each."""
    from deepspeed.runtime import config as ds

    return set(getattr(ds, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}))


def _unknown(key: str, known_keys: frozenset[str] | set[str]) -> ConfigError:
    similar = difflib.get_close_matches(key, known_keys - NOTES, n=1)
    is_zero_key = key in _zero_names()
    hint = f" Did you mean {similar[0]}?" if similar else " It belongs in zero_optimization." if is_zero_key else ""
    return _no_such_key(key, f", and would ignore it.{hint}")


def _no_such_key(name: str, end: str = ".") -> ConfigError:
    return ConfigError(f"{name}: DeepSpeed has no such key{end}", code="ds_config.unknown_key")


def _zero_names() -> set[str]:
    """Return the keys of `zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}


def _wrong_type(key: str, value: Any) -> list[ConfigError]:
    """Check the type of a top-level value, which DeepSpeed's parser does not check. Returns at most one problem."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None:
        return []
    for names, fits, expected in (
        (SECTIONS, isinstance(value, dict), "a section, {...}"),
        (FLAGS, isinstance(value, bool), "true or false"),
        (NUMBERS, is_number and value >= 0, "a number, 0 or more"),
        (TEXTS, isinstance(value, str), "text"),
    ):
        if key in names and not fits:
            return [_bad_value(key, value, expected)]
    return []


def _bad_value(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r:.80}, expected {expected}.", code="ds_config.bad_value")


def _section_problems(key: str, value: Any) -> list[ConfigError]:
    """Run DeepSpeed's parser on a minimal config with one top-level key, and return its complaints."""
    from deepspeed.runtime.config import DeepSpeedConfig

    if value is None or key in ("train_batch_size", "gradient_accumulation_steps", "optimizer", "scheduler"):
        return []
    ignored = _ignored_keys(key, value)
    if ignored:
        return ignored
    base: dict[str, Any] = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    try:
        with _quiet():
            DeepSpeedConfig({**base, key: value})
    except pydantic.ValidationError as error:
        return [_validation_problem(key, detail) for detail in error.errors()]
    except Exception as error:  # noqa: BLE001 - the parser raises AssertionError, KeyError, TypeError and others
        reason = str(error).strip() or type(error).__name__
        return [ConfigError(f"{key}: {reason}", code="ds_config.bad_value")]
    return []


def _validation_problem(section: str, error: Any) -> ConfigError:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path if path[:1] == [section] else [section, *path])
    if error["type"] == "extra_forbidden":
        similar = difflib.get_close_matches(path[-1], _zero_names(), n=1) if section == "zero_optimization" else []
        return _no_such_key(name, f". Did you mean {similar[0]}?" if similar else ".")
    reason = f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    return ConfigError(f"{name} is {error['input']!r:.80}: {reason}.", code="ds_config.bad_value")


def _ignored_keys(key: str, value: Any) -> list[ConfigError]:
    """Find unknown keys in the sections that DeepSpeed reads key by key and does not check."""
    from deepspeed.runtime.activation_checkpointing import config as checkpointing
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    known_keys: dict[str, set[str]] = {
        "aio": {*AIO_DEFAULT_DICT, "thread_count"},
        "activation_checkpointing": set(checkpointing.ACT_CHKPT_DEFAULT),
        "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
        "flops_profiler": {
            "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"
        },
    }  # fmt: skip
    if key not in known_keys:
        return []
    return [_no_such_key(f"{key}.{name}", ", and would ignore it.") for name in value if name not in known_keys[key]]


def _monitor_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    return [
        ConfigError(
            f"{section}.enabled is true, but the package {package} is not installed. Run pip install {package}, or remove "
            "the section.",
            code="ds_config.package_missing",
        )
        for section, package in _MONITOR_PACKAGES.items()
        if (config.get(section) or {}).get("enabled") and find_spec(package) is None
    ]


def _nvme_problems(zero: Mapping[str, Any]) -> list[ConfigError]:
    """Check that DeepSpeed can compile its NVMe operator, because the load would fail only when it first uses it."""
    sections = [name for name in ("offload_param", "offload_optimizer") if (zero.get(name) or {}).get("device") == "nvme"]
    if not sections:
        return []
    from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined]

    with _quiet():
        is_usable = AsyncIOBuilder().is_compatible(verbose=False)
    if is_usable:
        return []
    message = (
        f"zero_optimization.{sections[0]}.device is 'nvme', but DeepSpeed does not find libaio's headers or a C++ compiler. "
        "Install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL) and a compiler."
    )
    return [ConfigError(message, code="ds_config.nvme_needs_libaio")]


def _dtype_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    """Check the dtypes of `data_types`, which DeepSpeed looks up only when the engine starts."""
    from deepspeed.runtime.config import DtypeEnum

    problems = []
    for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        value = (config.get("data_types") or {}).get(name)
        try:
            dtype = None if value is None else DtypeEnum(value).value
        except (ValueError, TypeError):
            dtype = torch.int8
        if dtype is torch.int8:
            problems.append(_bad_value(f"data_types.{name}", value, "bf16, fp16 or fp32"))
    return problems


def _optimizer_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    section = config.get("optimizer")
    if section is None:
        return []
    problems = [_no_such_key(f"optimizer.{key}") for key in section if key not in _OPTIMIZER_SECTION]
    kind, params = section.get("type"), section.get("params") or {}
    cls = optimizer_class(kind) if isinstance(kind, str) else None
    if cls is None:
        from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

        names = ", ".join(sorted({*DEEPSPEED_OPTIMIZERS} - {"muadam", "muadamw", "musgd"}))
        return [*problems, _bad_value("optimizer.type", kind, f"one of {names}, or the name of a class in torch.optim")]
    if not isinstance(params, dict):
        return [*problems, _bad_value("optimizer.params", params, "a section, {...}")]
    if "max_grad_norm" in params:
        message = "optimizer.params.max_grad_norm: DeepSpeed refuses it. Set gradient_clipping at the top level of the config."
        problems.append(ConfigError(message, code="ds_config.max_grad_norm"))
    known_settings = {*parameter_names(cls), "torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach"}
    known_settings |= {"muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps"} if kind.lower() == "muon" else set()
    return problems + [
        _no_such_setting(f"optimizer.params.{name}", kind, sorted(parameter_names(cls)))
        for name in params
        if name not in known_settings and name != "max_grad_norm"
    ]


def _scheduler_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    section = config.get("scheduler")
    if section is None:
        return []
    problems = [_no_such_key(f"scheduler.{key}") for key in section if key not in _SCHEDULER_SECTION]
    kind, params = section.get("type"), section.get("params") or {}
    cls = scheduler_class(kind)
    if cls is None:
        from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

        names = ", ".join(VALID_LR_SCHEDULES)
        return [*problems, _bad_value("scheduler.type", kind, f"one of {names}, or a class in torch.optim.lr_scheduler")]
    if not isinstance(params, dict):
        return [*problems, _bad_value("scheduler.params", params, "a section, {...}")]
    known_settings = parameter_names(cls)
    unknown = [name for name in params if name not in known_settings]
    problems += [
        _bad_value(f"scheduler.params.{name}", params[name], 'a positive integer, or "auto"')
        for name in ("total_num_steps", "warmup_num_steps")
        if name in params and name in known_settings and (type(params[name]) is not int or params[name] < 1)
    ]
    return problems + [_no_such_setting(f"scheduler.params.{name}", str(kind), known_settings) for name in unknown]


def _no_such_setting(name: str, kind: str, known_settings: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{name}: {kind} has no such setting, expected one of {', '.join(known_settings)}.", code="ds_config.unknown_setting"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed's logger, which prints a line for each parse. Deprecations are logged when the engine starts."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
