"""Read a DeepSpeed config from a dict, a path or a shipped name; check it, and replace "auto" where a value is needed.

The config has two readers: the Trainer replaces "auto" by its arguments, while `zero.Init` needs values. `load_ds_config`
returns the config as written, for the Trainer; `resolve_auto` fills in the values on which the load depends.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from zero_sft.errors import ConfigError
from zero_sft.json_text import JsonError, parse_json
from zero_sft.packaged_file import packaged_file

_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16"}

_REPORTS = frozenset({
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "tensorboard", "wandb", "csv_monitor", "comet",
    "flops_profiler", "comms_logger",
})  # fmt: skip
"""Sections and keys that decide what a rank logs, but not how it trains."""

ADAMW_OPTIMS = frozenset({"adamw_torch", "adamw_torch_fused"})
"""Values of --optim that DeepSpeed's CPU Adam implements."""


def load_ds_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a DeepSpeed config.

    Args:
        source: the config itself, the path of a JSON file, or the name of a shipped config (`zero3`, `zero3_offload`, ...).

    Raises:
        ConfigError: the file or name does not exist, is not JSON or not ZeRO stage 3, or DeepSpeed can't read its precision.
    """
    if isinstance(source, Mapping):
        config, where = copy.deepcopy(dict(source)), "ds_config"
    else:
        path = _path_of(str(source))
        config, where = _read_json(path), str(path)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        raise ConfigError(
            f"{where} is not a ZeRO stage 3 config: zero_optimization.stage is {stage!r}. Set it to 3, or use a shipped one: "
            f"{', '.join(shipped_names())}.",
            code="ds_config.not_stage_3",
        )
    if zero is not None:
        _replace_former_keys(zero)
        for section in [name for name in ("offload_param", "offload_optimizer") if zero.get(name, "") is None]:
            del zero[section]  # DeepSpeed reads null as absent; transformers and accelerate fail at it
    return _plain_precision(config, where)


def _replace_former_keys(zero: dict[str, Any]) -> None:
    """Replace the keys by which configs of stage 2 turn on offload, as DeepSpeed does when its engine starts."""
    pinned = bool(zero.pop("cpu_offload_use_pin_memory", False))
    for former, section in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if isinstance(zero.get(former), bool) and zero.pop(former) and zero.get(section) is None:
            zero[section] = {"device": "cpu", "pin_memory": pinned}


def _plain_precision(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config with `bf16` and `fp16` in a plain form that all later readers interpret alike.

    DeepSpeed also reads the section's old name, `bfloat16`, if `bf16` is absent, and accepts 1, "true" or "on" as true. The
    Trainer does neither, and would train in another precision than the engine.
    """
    old_section = config.pop("bfloat16", None)
    if old_section is not None and config.get("bf16") is None:
        config["bf16"] = old_section
    for section in DTYPE_NAMES:
        if config.get(section) is None:
            config.pop(section, None)
            continue
        value = config[section]
        enabled = value.get("enabled", False) if isinstance(value, dict) else value
        try:
            plain = enabled if enabled == "auto" else pydantic.TypeAdapter(bool).validate_python(enabled)
        except pydantic.ValidationError:
            plain = None
        if plain is None or not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {section} is {json.dumps(value)}. Write it as an object, "
                f'"{section}": {{"enabled": true}}; "enabled" may also be false or "auto".',
                code="ds_config.bad_precision_section",
            )
        config[section] = {**value, "enabled": plain}
    if all(config.get(section, {}).get("enabled") is True for section in DTYPE_NAMES):
        raise ConfigError(f"{where} enables both bf16 and fp16. Set one of them to false.", code="ds_config.bf16_and_fp16")
    return config


def shipped_names() -> list[str]:
    """List the names of the shipped configs."""
    return sorted(path.stem for path in packaged_file("ds_configs").glob("*.json"))


def _path_of(source: str) -> Path:
    if source in shipped_names():
        return packaged_file("ds_configs", f"{source}.json")
    path = Path(source).expanduser()
    if path.is_file():
        return path
    raise ConfigError(
        f"no DeepSpeed config {source!r}: neither a file nor a shipped name ({', '.join(shipped_names())}).",
        code="ds_config.not_found",
    )


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}.", code="ds_config.unreadable") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8. Save it as UTF-8.", code="ds_config.not_json") from error
    except JsonError as error:
        raise ConfigError(
            f"{path} can't be used as JSON: {error.place_and_reason}. Expected one object; see docs/configs.md.",
            code="ds_config.not_json",
        ) from error


def engine_dtype(config: Mapping[str, Any], requested: str) -> str:
    """Return the dtype of the parameters under this engine: "bfloat16", "float16" or "float32".

    DeepSpeed trains parameters only in the engine's dtype, so the engine decides. If it says "auto", the `requested` dtype is
    used. Worked example: bf16.enabled "auto" and requested "bfloat16" → "bfloat16"; without bf16 → "float32".
    """
    for section, name in DTYPE_NAMES.items():
        enabled = (config.get(section) or {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and requested == name):
            return name
    return "float32"


def resolve_auto(config: Mapping[str, Any], dtype: str, node_group_size: int, world_size: int) -> dict[str, Any]:
    """Replace or drop every "auto", so that `zero.Init` and an engine without a Trainer accept the config.

    Raises:
        ConfigError: the hpZ size does not fit the ranks, or a batch size is not a positive integer.
    """
    result = without_auto(config)
    for section, name in DTYPE_NAMES.items():
        if section in config:
            result[section] = {**(result[section] or {}), "enabled": dtype == name}
    result["zero_optimization"].update(hpz_size(config, node_group_size, world_size))
    for key in _BATCH_SIZES:
        size = result.get(key)
        if size is None:
            result.pop(key, None)
        elif type(size) is not int or size < 1:
            raise ConfigError(f'{key} is {size!r}. Set it to a positive integer or to "auto".', code="ds_config.bad_batch_size")
    if not any(key in result for key in _BATCH_SIZES[:2]):
        result["train_micro_batch_size_per_gpu"] = 1
    return result


def hpz_size(config: Mapping[str, Any], node_group_size: int, world_size: int) -> dict[str, int]:
    """Return `{"zero_hpz_partition_size": n}` with "auto" as `node_group_size`, or {} if hpZ is off.

    Args:
        node_group_size: `World.node_group_size`, which is the number of ranks per node if nodes are alike.

    Raises:
        ConfigError: the size does not divide the number of ranks, or is larger, which DeepSpeed accepts silently.
    """
    size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size == 1:
        return {}
    size = node_group_size if size == "auto" else size
    is_divisor = type(size) is int and 1 <= size <= world_size and world_size % size == 0
    # A node must not hold parts of two groups, as it would with 3 ranks per group and 8 per node.
    if not is_divisor or (size % node_group_size and node_group_size % size):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {size!r}, but must be an integer that divides {world_size} "
            f"ranks and fits {node_group_size} ranks per node. Set it to the ranks per node (here {node_group_size}) or to "
            '"auto".',
            code="ds_config.bad_hpz_size",
        )
    return {"zero_hpz_partition_size": size}


def settings_to_match(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that must be equal on all ranks: no paths, and no reports, which one rank may write. Pure."""
    return {
        key: settings_to_match(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _REPORTS and not str(key).endswith("_path")
    }


def require_nvme(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless this machine can write every NVMe folder that the config names."""
    for section in ("offload_param", "offload_optimizer"):
        offload = config["zero_optimization"].get(section)
        if not isinstance(offload, Mapping) or offload.get("device") != "nvme":
            continue  # DeepSpeed's parser refuses what is not a section
        path = offload.get("nvme_path")
        if not path or not Path(path).is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"zero_optimization.{section}.nvme_path is {path!r}, which is not a writable folder here. Copy "
                "the config, set nvme_path to a folder on a local NVMe disk of every node, and name the copy with --deepspeed.",
                code="ds_config.nvme_path_unwritable",
            )


def without_auto(value: Any) -> Any:
    """Copy a config or a part of it, without the keys whose value is "auto"."""
    if isinstance(value, Mapping):
        return {key: without_auto(item) for key, item in value.items() if item != "auto"}
    return copy.deepcopy(value)
