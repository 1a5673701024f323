"""DeepSpeed configs: a dict, a path or a shipped name, checked, and free of "auto" where a value is needed.

Two readers want different things of one config: the Trainer replaces "auto" by its own arguments, `zero.Init` wants values.
`load_ds_config` returns the config as written, for the Trainer; `concrete` fills what the load itself depends on.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from zero_sft.errors import ConfigError
from zero_sft.shipped import shipped

_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def load_ds_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a DeepSpeed config.

    Args:
        source: the config itself, the path of a JSON file, or the name of a shipped one (`zero3`, `zero3_offload`, ...).

    Raises:
        ConfigError: no such file or name, not JSON, not ZeRO stage 3, or a precision that DeepSpeed would not understand.
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
        for section in [name for name in ("offload_param", "offload_optimizer") if zero.get(name, "") is None]:
            del zero[section]  # as DeepSpeed reads it; transformers and accelerate fail at null
    return _plain_precision(config, where)


def _plain_precision(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config with `bf16` and `fp16` in their plain spelling, which every later reader understands alike.

    DeepSpeed also reads the section's old name, `bfloat16`, where `bf16` is absent, and takes 1, "true" or "on" as true; the
    Trainer does neither, and would train in another precision than the engine.
    """
    old = config.pop("bfloat16", None)
    if old is not None and config.get("bf16") is None:
        config["bf16"] = old
    for section in DTYPE_NAMES:
        if config.get(section) is None:
            config.pop(section, None)
            continue
        written = config[section]
        enabled = written.get("enabled", False) if isinstance(written, dict) else written
        try:
            plain = enabled if enabled == "auto" else pydantic.TypeAdapter(bool).validate_python(enabled)
        except pydantic.ValidationError:
            plain = None
        if plain is None or not isinstance(written, dict):
            raise ConfigError(
                f'{where}: {section} is {json.dumps(written)}. Write it as {{"enabled": true}}, false or "auto".',
                code="ds_config.bad_precision_section",
            )
        config[section] = {**written, "enabled": plain}
    if all(config.get(section, {}).get("enabled") is True for section in DTYPE_NAMES):
        raise ConfigError(f"{where} enables both bf16 and fp16. Set one of them to false.", code="ds_config.bf16_and_fp16")
    return config


def shipped_names() -> list[str]:
    """The names of the shipped configs."""
    return sorted(path.stem for path in shipped("ds_configs").glob("*.json"))


def _path_of(source: str) -> Path:
    if source in shipped_names():
        return shipped("ds_configs", f"{source}.json")
    path = Path(source).expanduser()
    if path.is_file():
        return path
    raise ConfigError(
        f"no DeepSpeed config {source!r}: neither a file nor a shipped name ({', '.join(shipped_names())}).",
        code="ds_config.not_found",
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}.", code="ds_config.unreadable") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.", code="ds_config.not_json") from error


def engine_dtype(config: Mapping[str, Any], wanted: str) -> str:
    """The dtype that parameters have under this engine: "bfloat16", "float16" or "float32".

    DeepSpeed trains parameters in the engine's dtype alone, so the engine decides; where it says "auto", the `wanted` dtype
    does. Worked example: bf16.enabled "auto" and wanted "bfloat16" → "bfloat16"; bf16 absent and wanted "bfloat16" →
    "float32".
    """
    for section, name in DTYPE_NAMES.items():
        enabled = (config.get(section) or {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and wanted == name):
            return name
    return "float32"


def concrete(config: Mapping[str, Any], dtype: str, local_world_size: int, world_size: int) -> dict[str, Any]:
    """The config with every "auto" replaced or dropped, as `zero.Init` and an engine without a Trainer can take it.

    Raises:
        ConfigError: an hpZ size that does not fit the ranks.
    """
    result = without_auto(config)
    for section, name in DTYPE_NAMES.items():
        if section in config:
            result[section] = {**(result[section] or {}), "enabled": dtype == name}
    result["zero_optimization"].update(hpz_size(config, local_world_size, world_size))
    for key in _BATCH_SIZES:
        size = result.get(key)
        if size is None:
            result.pop(key, None)
        elif type(size) is not int or size < 1:
            raise ConfigError(
                f'{key} is {size!r}. Set it to a whole number from 1 on, or to "auto".', code="ds_config.bad_bucket_size"
            )
    if not any(key in result for key in _BATCH_SIZES[:2]):
        result["train_micro_batch_size_per_gpu"] = 1
    return result


def hpz_size(config: Mapping[str, Any], local_world_size: int, world_size: int) -> dict[str, int]:
    """`{"zero_hpz_partition_size": n}` as it has to be, or {} where hpZ is off. "auto" is `local_world_size`.

    `local_world_size`: the ranks per node, or where nodes differ `World.node_group_size`.

    Raises:
        ConfigError: a size that does not divide the number of ranks, or is larger: DeepSpeed takes the latter without a word.
    """
    size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size == 1:
        return {}
    size = local_world_size if size == "auto" else size
    if type(size) is not int or not 1 <= size <= world_size or world_size % size or _across_nodes(size, local_world_size):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {size!r}, which is no whole number that divides {world_size} ranks, "
            f'{local_world_size} on each node. Set it to the ranks per node (here {local_world_size}) or to "auto".',
            code="ds_config.bad_hpz_size",
        )
    return {"zero_hpz_partition_size": size}


def _across_nodes(size: int, local_world_size: int) -> bool:
    """True if a group of consecutive ranks would share some nodes with another: 3 ranks a group, 8 a node."""
    return bool(size % local_world_size and local_world_size % size)


def require_nvme(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless every NVMe folder that the config names can be written on this machine."""
    for section in ("offload_param", "offload_optimizer"):
        offload = config["zero_optimization"].get(section) or {}
        if offload.get("device") != "nvme":
            continue
        path = offload.get("nvme_path")
        if not path or not Path(path).is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"zero_optimization.{section}.nvme_path is {path!r}, which is no folder that can be written here. Copy "
                "the config, set nvme_path to a folder on a local NVMe disk of every node, and name the copy with --deepspeed.",
                code="ds_config.nvme_path_unwritable",
            )


def without_auto(value: Any) -> Any:
    """A copy of a config or a part of it, without the keys whose value is "auto"."""
    if isinstance(value, Mapping):
        return {key: without_auto(each) for key, each in value.items() if each != "auto"}
    return copy.deepcopy(value)
