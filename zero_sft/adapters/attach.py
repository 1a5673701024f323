"""Add adapters to a sharded model. PEFT makes them, on every rank the same; then they are sharded as the model is.

The base model is frozen by PEFT and stays as it was loaded. The adapters have the engine's dtype: ZeRO-3 can't train parameters
of two dtypes (DeepSpeed#8072). DeepSpeed keeps master weights for them in fp32, as for all that it trains.

Left out: adapters that are not LoRA. `peft.get_peft_model` adds any of PEFT's to a loaded model; DeepSpeed shards those when
the engine starts.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from zero_sft.adapters import peft_internals
from zero_sft.adapters.merge import require_mergeable
from zero_sft.adapters.options import LoraOptions
from zero_sft.checkpoint.folder_kind import ADAPTER_CONFIG
from zero_sft.errors import ArgumentError, CheckpointError
from zero_sft.four_bit.linear import Linear4bit
from zero_sft.json_text import JsonError, parse_json
from zero_sft.printable import excerpt, first_of
from zero_sft.zero.gather_hooks import gather_with, install_gather_hooks
from zero_sft.zero.init import shard_parameters

_PATTERN = re.compile(r"[*+?()\[\]|\\^$]")
_ALL_LINEAR = "all-linear"
_RECORDED = ("r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save", "bias", "use_dora", "use_rslora")


def lora_config(options: LoraOptions) -> LoraConfig:
    """Make PEFT's config from the options, or read that of the adapter to train on.

    Raises:
        ArgumentError: PEFT refuses the options.
        CheckpointError: the adapter's config can't be read, or it is not LoRA's.
    """
    if options.lora_weight_path is not None:
        return read_lora_config(Path(options.lora_weight_path).expanduser())
    try:
        return LoraConfig(
            r=options.lora_r or 0,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.dropout,
            target_modules=_targets(options),
            target_parameters=options.lora_target_parameters,
            modules_to_save=options.lora_modules_to_save,
            bias=options.lora_bias,
            use_dora=options.use_dora,
            use_rslora=options.use_rslora,
            task_type="CAUSAL_LM",
        )
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"PEFT refuses the options of LoRA: {_sentence(error)}", code="adapter.refused") from error


def _targets(options: LoraOptions) -> list[str] | str | None:
    """Return PEFT's `target_modules`: a text is one regular expression there, or all-linear."""
    names = options.lora_target_modules
    if not names:
        return [] if options.lora_target_parameters else None  # None: PEFT's choice for the model's type
    if len(names) == 1 and (names[0] == _ALL_LINEAR or _PATTERN.search(names[0])):
        return names[0]
    return list(names)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read the config of a LoRA adapter in a folder.

    Raises:
        CheckpointError: it can't be read, or is of another kind.
    """
    path = folder / ADAPTER_CONFIG
    try:
        kind = parse_json(path.read_text(encoding="utf-8"))["peft_type"]
        config = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, JsonError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the config of an adapter: {_sentence(error)}. Name a folder that PEFT or this job has written.",
            code="adapter.config_unusable",
        ) from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(
            f"{folder} is an adapter of the kind {kind}; this job trains LoRA alone. Load it in your own code, with PEFT.",
            code="adapter.not_lora",
        )
    if type(config.r) is not int or config.r < 1 or not isinstance(config.lora_alpha, int | float):
        raise CheckpointError(
            f"{path} has r {excerpt(repr(config.r))} and lora_alpha {excerpt(repr(config.lora_alpha))}; expected numbers, as "
            "PEFT and this job write them.",
            code="adapter.config_unusable",
        )
    config.inference_mode = False
    return config


def add_adapters(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """Wrap a loaded model in PEFT's, with new adapters. Every rank; communicates if an adapter starts from base weights.

    Args:
        seed: of the adapters' random values, which must be the same on all ranks.

    Raises:
        ArgumentError: the model has no such modules, or PEFT can't adapt them. The same on every rank.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapted = wrapped(model, config)
    # The backward hooks of the first module that has adapters need an input with a gradient: with activation checkpointing, and
    # of DeepSpeed's leaf modules (experts), whose gradients would be reduced before they are there.
    adapted.enable_input_require_grads()
    for _, layer in peft_internals.adapted_layers(adapted):
        for module, params in peft_internals.foreign_parameters(layer):
            gather_with(module, params)
    shard_parameters(adapted)
    install_gather_hooks(adapted)
    return adapted


def adapted_on_meta(model: Any, config: LoraConfig, *, merge: bool = False) -> Any:
    """Add adapters to a model on the meta device. Any rank; does not communicate.

    Args:
        merge: whether the adapter will be merged.

    Raises:
        ArgumentError: as `add_adapters`.
        ExportError: the adapter can't be merged.
    """
    with torch.device("meta"):
        adapted = wrapped(model, config, on_meta=True)
    if merge:
        require_mergeable(adapted)
    return adapted


def require_all_found(adapted: Any, options: LoraOptions) -> None:
    """Check that each given name of modules fits one: PEFT passes over a name if another fits.

    Raises:
        ArgumentError: a name fits no module.
    """
    names = [f".{name}." for name, _ in adapted.named_modules()]
    given = {"lora_target_modules": _targets(options), "lora_modules_to_save": options.lora_modules_to_save}
    for option, wanted in given.items():
        missing = [name for name in wanted or () if not any(f".{name}." in each for each in names)]
        if missing and not isinstance(wanted, str):
            raise ArgumentError(
                f"--{option}: no module is called {missing[0]}. The linear modules are called "
                f"{', '.join(_linear_names(adapted.get_base_model()))}.",
                code="adapter.no_such_modules",
            )


def recorded_settings(config: LoraConfig) -> dict[str, Any]:
    """Return the settings on which a checkpoint of the adapter depends, as JSON holds them."""
    values = {name: getattr(config, name) for name in _RECORDED}
    return {name: sorted(value) if isinstance(value, (set, list, tuple)) else value for name, value in values.items()}


def wrapped(model: Any, config: LoraConfig, *, on_meta: bool = False) -> Any:
    """Wrap a model in PEFT's, with new adapters. Any rank.

    Raises:
        ArgumentError: as `add_adapters`.
    """
    peft_internals.check()
    if config.layer_replication:
        raise ArgumentError(
            "the adapter repeats layers of its base model (layer_replication), which is untested here. Merge it with PEFT, and "
            "train the model that results.",
            code="adapter.repeats_layers",
        )
    if config.use_dora and _in_4_bits(model):
        raise ArgumentError(
            "DoRA needs the lengths of the weights' rows, and these weights are in 4 bits. Leave --load_in_4bit out, or train "
            "an adapter without DoRA.",
            code="adapter.dora_in_4_bits",
        )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        reason = _sentence(error)
        if not config.target_modules and not config.target_parameters:
            reason = "PEFT has no default modules for models of this type, so some have to be named"
        names = ", ".join(_linear_names(model))
        raise ArgumentError(
            f"LoRA can't be added to {type(model).__name__}: {reason}. Its linear modules are called {names}: see "
            "--lora_target_modules.",
            code="adapter.no_such_modules",
        ) from error
    if trained := [name for name, module in _in_4_bits(adapted) if module.weight.requires_grad]:
        raise ArgumentError(
            f"--lora_modules_to_save: {first_of(trained, 1)} is in 4 bits, which can't be trained. Leave it out, or leave "
            "--load_in_4bit out.",
            code="adapter.trains_4_bits",
        )
    if peft_internals.is_adapted_layer(_head(adapted)):
        raise ArgumentError(
            "an adapter on the output embeddings would not be trained, since TRL computes the loss from their weight alone. "
            "Leave them out of --lora_target_modules; --lora_modules_to_save lm_head trains them as a whole.",
            code="adapter.on_output_embeddings",
        )
    return adapted


def _in_4_bits(model: nn.Module) -> list[tuple[str, Linear4bit]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def _head(adapted: Any) -> Any:
    try:
        return adapted.get_base_model().get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of a model's linear modules."""
    linear = (name for name, module in model.named_modules() if "Linear" in type(module).__name__ or _is_conv1d(module))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
