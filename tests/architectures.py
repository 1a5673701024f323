"""Create a tiny checkpoint of any model type that `AutoModelForCausalLM` supports."""

import dataclasses
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architecture_sizes import ADDITIONS, KINDS, OVERRIDES, SIZES

CAUSAL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_ALL_SHARED = "every layer takes the keys and values of another layer, which transformers' own text model refuses to build"

NOT_BUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model, and timm is not installed",
    "gemma4_assistant": _ALL_SHARED,
    "gemma4_unified_assistant": _ALL_SHARED,
}

# Composite types of which `AutoModelForCausalLM` builds only the text model; their published checkpoints also hold the towers.
# (emu3 is left out, since transformers looks for its text model under wrong names.)
COMPOSITE_TYPES: tuple[str, ...] = ("dots3_note", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the config of a tiny model of this type, with the fewest layers that include every kind, and odd widths."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class(**ADDITIONS.get(model_type, {}))
    return config_class(**_merged(_shrunk(default), OVERRIDES.get(model_type, {})))


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.bfloat16, *, towers: bool = False) -> Path:
    """Save a randomised checkpoint in several files; `towers` saves the whole model of a composite type."""
    torch.manual_seed(7)
    config = tiny_config(model_type)
    model = (AutoModelForImageTextToText if towers else AutoModelForCausalLM).from_config(config, dtype=dtype)
    randomise(model)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 3)
    if model.config.model_type != config.model_type:
        config.save_pretrained(folder)  # replaces the text model's config, from which some types can't be loaded
    return Path(folder)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Fill all stored tensors with non-zero values that differ between tensors, rows and columns."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
        elif not tensor.any():
            tensor.random_(0, 2)  # other integers are sizes and offsets, which must not change


def _shrunk(config: PreTrainedConfig) -> dict:
    """Return the arguments that shrink a default config; the config then derives its other values from them."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    arguments = {}
    for name, default in fields.items():
        value = vars(config).get(name)
        if isinstance(value, PreTrainedConfig):
            arguments[name] = {"model_type": value.model_type, **_shrunk(value)}
        elif name in SIZES and (type(default) is int or name in ("head_dim", "num_key_value_heads")):
            arguments[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index")) and type(default) is int and default >= SIZES["vocab_size"]:
            arguments[name] = 3
    if "rope_parameters" in fields and "head_dim" not in fields and "hidden_size" in arguments:
        arguments["hidden_size"] = 40  # RoPE needs heads of even width
    if "qk_rope_head_dim" in fields:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]  # latent attention has no groups of heads
    kinds = {name: list(dict.fromkeys(vars(config)[name])) for name in KINDS if vars(config).get(name)}
    if kinds:
        layers = max(2, *map(len, kinds.values()))
        arguments |= {name: (each + each[-1:] * layers)[:layers] for name, each in kinds.items()}
        if "num_hidden_layers" in fields:
            arguments["num_hidden_layers"] = layers
    return arguments


def _merged(base: dict, changes: dict) -> dict:
    """Return `base` with `changes`; sub-configs are merged in the same way."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if nested else value
    return merged
