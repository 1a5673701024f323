"""Determine a model's context and scale its RoPE. The public functions are pure.

`use_cache` is switched off. If `model_max_length` exceeds the model's context, RoPE positions are interpolated linearly, as in
FastChat (https://arxiv.org/abs/2306.15595): with `factor` 2.0, positions 0..8191 of a model trained on 4096 become 0, 0.5, 1,
..., 4095.5. Models with another kind of scaling are left unchanged: their authors chose it, and nobody has trained the model
that a second scaling would make.

Positions are derived from a config's attributes, not from a list of models, so that future models are covered. The kind of
scaling is not chosen (to use yarn, give `rope_parameters`), and learned position tables are not extended, which would need new
weights.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zero_sft.errors import ArgumentError, ConfigError

_COUNTS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions", "n_ctx")
"""Names under which configs state the number of positions."""

_UNBOUNDED = {"bloom", "rwkv", "xlnet", "inkling_text", "inkling2_text"}
"""Model types with unlimited positions, although a config may state a length (ALiBi, recurrence, relative biases)."""

_LOCAL = ("sliding", "chunked", "window", "main")
"""Words in the layer types of sliding-window layers ("main": DeepSeek-V4's)."""

_SCALING = {
    "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "type", "rope_type",
}  # fmt: skip
"""Keys that belong to one kind of scaling and are removed when the kind changes. Others (`rope_theta`, ...) stay."""

_NUMBERS = frozenset({
    "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast",
    "attention_factor", "partial_rotary_factor",
})  # fmt: skip
_QUOTED_NUMBER = re.compile(r"\d+\.?\d*(e\d+)?")
_NEED_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_TYPES_OF_MODELS = ("mrope",)
"""Types that some models' config classes replace by another."""

_VALIDATION = re.compile(r"_validate_(\w+)_rope_parameters")
"""Names of the methods with which a config's class checks the types that it supports."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of `config` that describes the language model: itself, its `text_config` or its `decoder`."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ConfigError(
            f"{config.name_or_path} has no single language model to fine-tune: {error}", code="config.no_language_model"
        ) from error


def with_context(
    config: PreTrainedConfig, *, model_max_length: int | None = None, rope_parameters: dict | None = None
) -> PreTrainedConfig:
    """Return a copy of `config` for training on up to `model_max_length` tokens. Pure; raises `prepare_config`'s errors."""
    if model_max_length is not None:
        require_length(model_max_length)
    config = copy.deepcopy(config)
    text = text_config(config)
    name = config.name_or_path or text.model_type
    config.use_cache = text.use_cache = False
    if rope_parameters is not None:
        _merge_parameters(text, rope_parameters, name)
        if model_max_length is not None:
            _require_reach(text, model_max_length)
        return config
    for layers, rope in _rope_by_layer(text).items():
        problem = _unusable(rope, text)
        if problem:
            where = "rope_parameters" if layers is None else f"rope_parameters of {layers}"
            raise ConfigError(
                f"{name}: {where} (rope_scaling) in config.json: {problem}. Compare it with the original.",
                code="rope.bad_parameters_in_config",
            )
    if model_max_length is not None:
        _extend_context(text, model_max_length, name)
    return config


def require_length(model_max_length: object) -> None:
    """Raise `ArgumentError` unless a value can be a length in tokens."""
    if type(model_max_length) is not int or not 1 <= model_max_length < 2**31:
        raise ArgumentError(
            f"--model_max_length must be a whole number, at least 1 and below 2**31; got {model_max_length!r}.",
            code="arguments.wrong_value",
        )


def positions(text: PreTrainedConfig) -> Literal["rope", "table", "unbounded"]:
    """Return how a language model encodes positions.

    "rope": rotations with parameters in the config, which can be scaled. "table": one row per position, learned or computed
    (OPT, GPT-2, BioGPT; also GPT-J, whose rotations are rows of a table); the last row is the last position. "unbounded": ALiBi
    (Bloom, MPT, Falcon with `alibi`), recurrence (Mamba, Jamba, RWKV), relative biases, or no encoding.
    """
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False) or text.model_type in _UNBOUNDED:
        return "unbounded"
    if _rope_by_layer(text):
        # Two hybrid families state RoPE parameters even where they don't use them.
        unused = getattr(text, "position_embedding_type", "rope") != "rope" or not getattr(text, "use_mem_rope", True)
        return "unbounded" if unused else "rope"
    recurrent = "linear_attention" in (getattr(text, "layer_types", None) or ())
    return "table" if _count(text) and not recurrent else "unbounded"


def context_tokens(rope: Mapping[str, Any], position_count: int) -> int:
    """Return the real context of a model with these RoPE parameters, in tokens.

    `position_count` is the config's `max_position_embeddings`, whose meaning depends on the kind of scaling:

    default: the trained length.
    linear, dynamic, proportional: by transformers' documentation the trained length, so the context is that times `factor`
        (Vicuna-16k: 4096 x 4.0). Some models state the extended length instead (Gemma 3); configs don't show the difference,
        so the documented meaning is used.
    yarn: the larger of the stated length and `original_max_position_embeddings * factor`, because both meanings are in use:
        DeepSeek-V3 states the extended length (163840 = 4096 x 40), Qwen2.5 the trained one (32768; extended: 32768 x 4.0).
    llama3, longrope: the extended length. The product can be wrong or missing: Llama 3.2 states 131072 with 8192 and factor
        32, more than it was trained on; Phi-3 has no `factor`. The product is used only if the stated length is not above
        the original, so that it can't be the extended one.
    """
    factor, original = rope.get("factor") or 1.0, rope.get("original_max_position_embeddings") or position_count
    match _kind(rope):
        case "linear" | "dynamic" | "proportional":
            return int(position_count * factor)
        case "yarn":
            return max(position_count, int(original * factor))
        case "llama3" | "longrope" if original >= position_count:
            return int(original * factor)
    return position_count


def max_context_tokens(text: PreTrainedConfig) -> int | None:
    """Return the longest sequence that a language model can read, in tokens; None if its config sets no limit."""
    kind, count = positions(text), _count(text)
    if count is None or kind == "unbounded":
        return None
    return max([count, *(context_tokens(rope, count) for rope in _global_rope(text).values())])


def _extend_context(text: PreTrainedConfig, length: int, name: str) -> None:
    """Scale RoPE in place if the context is shorter than `length` tokens."""
    encoding, count = positions(text), _count(text)
    if count is None or encoding == "unbounded":
        if 0 < (getattr(text, "max_seq_len", None) or 0) < length:
            text.max_seq_len = length  # MPT computes ALiBi biases for this many positions, and fails beyond
        return
    if encoding == "table" and length > count:
        raise ConfigError(
            f"{name} can't read more than {count} tokens: its position table has that length (model type "
            f"{text.model_type}, no RoPE to scale). Got --model_max_length {length}; give at most {count}.",
            code="rope.position_table_too_short",
        )
    for layers, rope in _global_rope(text).items():
        kind, context = _kind(rope), context_tokens(rope, count)
        if length <= context:
            continue
        if kind not in ("default", "linear"):
            factor = float(math.ceil(length / (rope.get("original_max_position_embeddings") or count)))
            raise ConfigError(
                f"{name} has a context of {context} tokens by RoPE scaling of the kind {kind} ({rope!r:.300}), which is "
                f"not replaced silently for --model_max_length {length}. Give at most {context}, or set the "
                f"scaling with rope_parameters, merged into these: {{'rope_type': '{kind}', 'factor': {factor}, ...}}",
                code="rope.other_scaling_in_place",
            )
        _write(text, layers, {"rope_type": "linear", "factor": float(math.ceil(length / count))})


def _merge_parameters(text: PreTrainedConfig, new: dict, name: str) -> None:
    """Merge `new` into the model's RoPE parameters in place: one dict for the global layers, or one by layer type."""
    current = _rope_by_layer(text)
    if positions(text) != "rope":
        raise ConfigError(
            f"{name} (model type {text.model_type}) has no RoPE: leave rope_parameters out.", code="rope.model_without_rope"
        )
    by_layer = isinstance(new, dict) and any(isinstance(value, dict) for value in new.values())
    for layers, changes in (new if by_layer else dict.fromkeys(_global_rope(text) or current, new)).items():
        kind = changes.get("rope_type") if isinstance(changes, dict) else None
        if layers not in current or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
            raise ConfigError(
                f"rope_parameters: expected a dict such as {{'rope_type': 'linear', 'factor': 2.0}}, its rope_type one "
                f"of default, {', '.join(ROPE_INIT_FUNCTIONS)}; or such a dict by layer type, of which {name} has "
                f"{', '.join(filter(None, current)) or 'only one'}. Got {new!r}.",
                code="rope.bad_parameters",
            )
        problem = _unusable(changes, text)
        if problem:
            raise ArgumentError(f"rope_parameters: {problem}. Given: {new!r}.", code="rope.bad_parameters")
        if changes.get("factor", 1) < 1:
            raise ArgumentError(
                f"rope_parameters: 'factor' must be a number, at least 1; got {changes['factor']!r}.",
                code="rope.bad_parameters",
            )
        _write(text, layers, changes)
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except Exception as error:  # KeyError, TypeError, AttributeError and others
        raise ArgumentError(
            f"rope_parameters do not fit {name}: {error}. Given: {new!r}.", code="rope.bad_parameters"
        ) from error


def _unusable(rope: Mapping[str, Any], text: PreTrainedConfig) -> str:
    """Say why one dict of RoPE parameters is unusable, or return "". The model's code would raise a less clear error."""
    kind = _kind(rope)
    validated = {match.group(1) for match in map(_VALIDATION.fullmatch, dir(type(text))) if match}
    kinds = sorted({"default", *ROPE_INIT_FUNCTIONS, *validated, *_TYPES_OF_MODELS})
    if kind not in kinds:
        return f"the rope_type {kind!r} is unknown; known: {', '.join(kinds)}"
    for key in sorted(_NUMBERS & rope.keys()):
        value = rope[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value) and value > 0):
            hint = f" Write it without quotes: {value}" if isinstance(value, str) and _QUOTED_NUMBER.fullmatch(value) else ""
            return f"{key!r} must be a number above 0, got {value!r}.{hint}".rstrip(".")
    if kind in _NEED_FACTOR and rope.get("factor") is None:
        return f"the rope_type {kind!r} needs a 'factor', which is missing in {dict(rope)!r:.200}"
    return ""


def _require_reach(text: PreTrainedConfig, length: int) -> None:
    """Refuse a given factor that is too small for `length` tokens. Scaling without a factor is the user's choice."""
    count = _count(text)
    if count is None:
        return
    for rope in _global_rope(text).values():
        context = context_tokens(rope, count)
        if _kind(rope) not in _NEED_FACTOR or length <= context:
            continue
        base: int = count if _kind(rope) in ("linear", "dynamic") else rope.get("original_max_position_embeddings") or count
        raise ArgumentError(
            f"rope_parameters reach {context} tokens (rope_type {_kind(rope)!r}, factor {rope['factor']} of {base} tokens), "
            f"less than --model_max_length {length}. Give a factor of at least {math.ceil(100 * length / base) / 100:g}, "
            f"or --model_max_length {context}.",
            code="rope.does_not_reach_length",
        )


def _write(text: PreTrainedConfig, layers: str | None, changes: Mapping[str, Any]) -> None:
    """Merge `changes` into the RoPE parameters of these layers (None: those of all layers)."""
    old = _rope_by_layer(text)[layers]
    kept = {key: value for key, value in old.items() if key not in _SCALING or _kind(old) == changes["rope_type"]}
    new = {**kept, **changes}
    text.rope_parameters = new if layers is None else {**text.rope_parameters, layers: new}
    if "original_max_position_embeddings" in changes and hasattr(text, "original_max_position_embeddings"):
        # Phi-3 also states it outside the RoPE parameters, and transformers prefers that value.
        text.original_max_position_embeddings = changes["original_max_position_embeddings"]


def _rope_by_layer(text: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Return RoPE parameters by layer type, or under None if all layers share them; empty without RoPE."""
    rope = getattr(text, "rope_parameters", None) or {}
    if not rope and getattr(text, "rope_theta", None):  # custom code written for transformers 4
        rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    by_layer = {layers: value for layers, value in rope.items() if isinstance(value, dict)}
    return by_layer or ({None: rope} if any(value is not None for value in rope.values()) else {})


def _global_rope(text: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Return `_rope_by_layer` without sliding-window layers, whose context needs no extension."""
    rope = _rope_by_layer(text)
    return {layers: value for layers, value in rope.items() if not any(word in (layers or "") for word in _LOCAL)}


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _count(text: PreTrainedConfig) -> int | None:
    """Return the number of positions that the config states, if any."""
    stated = (getattr(text, name, None) for name in _COUNTS)
    return next((count for count in stated if isinstance(count, int) and count > 0), None)
