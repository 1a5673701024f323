"""A model's context and the scaling of its RoPE, as pure functions from config to config.

`use_cache` is switched off. Where `model_max_length` is more than the model can tell apart, RoPE positions are
interpolated linearly, as FastChat does (https://arxiv.org/abs/2306.15595): positions 0..8191 of a model trained on 4096
become 0, 0.5, 1, ..., 4095.5 by `factor` 2.0. Models that are scaled in another way are left alone: that was their
authors' choice, and a second scaling instead of it would make a model that nobody has trained.

What a config says about positions is read from its attributes, not from a list of models, so that models to come are
covered. Left out: choosing among the kinds of scaling (who wants yarn says so with `rope_parameters`), and stretching learned
position tables, which would need new weights.
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
"""Names that configs give to the number of positions."""

_UNBOUNDED = {"bloom", "rwkv", "xlnet", "inkling_text", "inkling2_text"}
"""Model types whose positions have no end although a config may state a length (ALiBi, recurrence, relative biases)."""

_LOCAL = ("sliding", "chunked", "window", "main")
"""Words in the names of layers that see no further than a window ("main": DeepSeek-V4's sliding layers)."""

_SCALING = {
    "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "type", "rope_type",
}  # fmt: skip
"""Keys that belong to one kind of scaling and go when the kind changes; the others (`rope_theta`, ...) always stay."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the language model: itself, or its `text_config` or `decoder`."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ConfigError(
            f"{config.name_or_path} has no single language model to fine-tune: {error}", code="config.no_language_model"
        ) from error


_NUMBERS = frozenset({
    "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast",
    "attention_factor", "partial_rotary_factor",
})  # fmt: skip
_NEED_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_TYPES_OF_MODELS = ("mrope",)
"""Types that some models' configs turn into another."""

_VALIDATION = re.compile(r"_validate_(\w+)_rope_parameters")


def with_context(
    config: PreTrainedConfig, *, model_max_length: int | None = None, rope_parameters: dict | None = None
) -> PreTrainedConfig:
    """A copy of `config` for training on up to `model_max_length` tokens. Pure; errors as in `prepare_config`."""
    whole = isinstance(model_max_length, int) and not isinstance(model_max_length, bool)
    if model_max_length is not None and (not whole or not 1 <= model_max_length < 2**31):
        raise ConfigError(
            f"--model_max_length must be a whole number, at least 1 and below 2**31; got {model_max_length!r}.",
            code="arguments.wrong_value",
        )
    config = copy.deepcopy(config)
    text = text_config(config)
    name = config.name_or_path or text.model_type
    config.use_cache = text.use_cache = False
    if rope_parameters is not None:
        _replace(text, rope_parameters, name)
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
        _stretch(text, model_max_length, name)
    return config


def positions(text: PreTrainedConfig) -> Literal["rope", "table", "unbounded"]:
    """How a language model tells positions apart.

    "rope": rotations with parameters in the config, which can be scaled. "table": a row a position, learned or computed
    (OPT, GPT-2, BioGPT; also GPT-J, whose rotations are rows of a table); the last row is the end. "unbounded": ALiBi
    (Bloom, MPT, Falcon with `alibi`), recurrence (Mamba, Jamba, RWKV), relative biases, or nothing at all.
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
    """The context that a model with these RoPE parameters really has, in tokens.

    `position_count` is the config's `max_position_embeddings`, whose meaning depends on the kind of scaling:

    default: the trained length.
    linear, dynamic, proportional: transformers' documentation leaves it as trained when these are added, so the context
        is that times `factor` (Vicuna-16k: 4096 x 4.0). Some models state the stretched length all the same (Gemma 3);
        nothing in a config tells them apart, so the documented meaning is taken.
    yarn: `original_max_position_embeddings * factor`, unless the stated length is more, because both are in use: the
        stretched length in DeepSeek-V3 (163840 = 4096 x 40), the trained one in Qwen2.5 (32768; it is 32768 x 4.0).
    llama3, longrope: the stretched length. Llama 3.2 states 131072 with 8192 and factor 32, whose product is more than
        it was trained on; Phi-3 has no `factor` at all. Only where the stated length is not above the original, so
        can't be the stretched one, is it the product.
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


def readable_tokens(text: PreTrainedConfig) -> int | None:
    """The longest sequence that a language model can read, in tokens; None where its config sets no end."""
    kind, count = positions(text), _count(text)
    if count is None or kind == "unbounded":
        return None
    return max([count, *(context_tokens(rope, count) for rope in _global_rope(text).values())])


def _stretch(text: PreTrainedConfig, wanted: int, name: str) -> None:
    """Scale RoPE in place if the context is less than `wanted` tokens."""
    kind, count = positions(text), _count(text)
    if count is None or kind == "unbounded":
        if 0 < (getattr(text, "max_seq_len", None) or 0) < wanted:
            text.max_seq_len = wanted  # MPT computes ALiBi biases for so many positions, and fails beyond
        return
    if kind == "table" and wanted > count:
        raise ConfigError(
            f"{name} can't read more than {count} tokens: it looks positions up in a table of that length (model type "
            f"{text.model_type}, no RoPE to scale). Got --model_max_length {wanted}; give at most {count}.",
            code="rope.position_table_too_short",
        )
    for layers, rope in _global_rope(text).items():
        has, context = _kind(rope), context_tokens(rope, count)
        if wanted <= context:
            continue
        if has not in ("default", "linear"):
            factor = float(math.ceil(wanted / (rope.get("original_max_position_embeddings") or count)))
            raise ConfigError(
                f"{name} has a context of {context} tokens by RoPE scaling of the kind {has} ({rope!r:.300}), which is "
                f"not replaced silently for --model_max_length {wanted}. Give at most {context}, or say how to scale "
                f"with rope_parameters, which are laid over these: {{'rope_type': '{has}', 'factor': {factor}, ...}}",
                code="rope.other_scaling_in_place",
            )
        _write(text, layers, {"rope_type": "linear", "factor": float(math.ceil(wanted / count))})


def _replace(text: PreTrainedConfig, given: dict, name: str) -> None:
    """Lay `given` over the model's RoPE parameters in place: one dict for the global layers, or one by layer type."""
    own = _rope_by_layer(text)
    if positions(text) != "rope":
        raise ConfigError(
            f"{name} (model type {text.model_type}) has no RoPE: leave rope_parameters out.", code="rope.model_without_rope"
        )
    by_layer = isinstance(given, dict) and any(isinstance(each, dict) for each in given.values())
    for layers, changes in (given if by_layer else dict.fromkeys(_global_rope(text) or own, given)).items():
        kind = changes.get("rope_type") if isinstance(changes, dict) else None
        if layers not in own or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
            raise ConfigError(
                f"rope_parameters: expected a dict such as {{'rope_type': 'linear', 'factor': 2.0}}, its rope_type one "
                f"of default, {', '.join(ROPE_INIT_FUNCTIONS)}; or such a dict by layer type, of which {name} has "
                f"{', '.join(filter(None, own)) or 'only one'}. Got {given!r}.",
                code="rope.bad_parameters",
            )
        problem = _unusable(changes, text)
        if problem:
            raise ArgumentError(f"rope_parameters: {problem}. Given: {given!r}.", code="rope.bad_parameters")
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
            f"rope_parameters do not fit {name}: {error}. Given: {given!r}.", code="rope.bad_parameters"
        ) from error


def _unusable(rope: Mapping[str, Any], text: PreTrainedConfig) -> str:
    """What is wrong with one dict of RoPE parameters, or ""; a model's own code would fail on it in a raw error."""
    kind = _kind(rope)
    known = _kinds(text)
    if kind not in known:
        return f"the rope_type {kind!r} is unknown; known: {', '.join(known)}"
    for key in sorted(_NUMBERS & rope.keys()):
        value = rope[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value > 0):
            hint = f" Write it without quotes: {value}" if isinstance(value, str) and _is_number(value) else ""
            return f"{key!r} must be a number above 0, got {value!r}.{hint}".rstrip(".")
    if kind in _NEED_FACTOR and rope.get("factor") is None:
        return f"the rope_type {kind!r} needs a 'factor', and there is none in {dict(rope)!r:.200}"
    return ""


def _kinds(text: PreTrainedConfig) -> list[str]:
    """The rope_types that this config's class or transformers knows."""
    own = {found.group(1) for found in map(_VALIDATION.fullmatch, dir(type(text))) if found}
    return sorted({"default", *ROPE_INIT_FUNCTIONS, *own, *_TYPES_OF_MODELS})


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _require_reach(text: PreTrainedConfig, wanted: int) -> None:
    """Refuse a factor that was given and is too small for `wanted` tokens; what has no factor is the user's own choice."""
    count = _count(text)
    if count is None:
        return
    for rope in _global_rope(text).values():
        context = context_tokens(rope, count)
        if _kind(rope) not in _NEED_FACTOR or wanted <= context:
            continue
        base: int = count if _kind(rope) in ("linear", "dynamic") else rope.get("original_max_position_embeddings") or count
        raise ArgumentError(
            f"rope_parameters reach {context} tokens (rope_type {_kind(rope)!r}, factor {rope['factor']} of {base} tokens), "
            f"less than --model_max_length {wanted}. Give a factor of at least {math.ceil(100 * wanted / base) / 100:g}, "
            f"or --model_max_length {context}.",
            code="rope.does_not_reach_length",
        )


def _write(text: PreTrainedConfig, layers: str | None, changes: Mapping[str, Any]) -> None:
    """Lay `changes` over the RoPE parameters of these layers (None: those of all layers)."""
    old = _rope_by_layer(text)[layers]
    stays = {key: value for key, value in old.items() if key not in _SCALING or _kind(old) == changes["rope_type"]}
    new = {**stays, **changes}
    text.rope_parameters = new if layers is None else {**text.rope_parameters, layers: new}
    if "original_max_position_embeddings" in changes and hasattr(text, "original_max_position_embeddings"):
        # Phi-3 keeps it beside the RoPE parameters too, and transformers lets that one win.
        text.original_max_position_embeddings = changes["original_max_position_embeddings"]


def _rope_by_layer(text: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """RoPE parameters by layer type, or under None where all layers share them; empty without RoPE."""
    rope = getattr(text, "rope_parameters", None) or {}
    if not rope and getattr(text, "rope_theta", None):  # custom code in the manner of transformers 4
        rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    by_layer = {layers: each for layers, each in rope.items() if isinstance(each, dict)}
    return by_layer or ({None: rope} if any(each is not None for each in rope.values()) else {})


def _global_rope(text: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """`_rope_by_layer` without the layers that see no further than a window, so need no stretching."""
    rope = _rope_by_layer(text)
    return {layers: each for layers, each in rope.items() if not any(word in (layers or "") for word in _LOCAL)}


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _count(text: PreTrainedConfig) -> int | None:
    """The number of positions that the config states, if any."""
    stated = (getattr(text, name, None) for name in _COUNTS)
    return next((each for each in stated if isinstance(each, int) and each > 0), None)
