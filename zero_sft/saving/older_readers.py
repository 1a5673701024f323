"""What readers of transformers 4's files need of an export, next to what transformers 5 writes.

transformers 4, vLLM and llama.cpp's converter read RoPE from `rope_theta` and `rope_scaling` at the top of a config, and take
theta 10,000 without scaling where these are missing. transformers 5 moved both into `rope_parameters`, and reads the old names
as well. So both are written, with the same values. Likewise for the dtype, and for the names that tokenizers had.

Everything here runs on rank 0 and does not communicate.
"""

from collections.abc import Mapping
from typing import Any

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
"""Layer types of models that rotate by layer type. The older config has the first one's values under the usual names."""

_NEOX = {"theta": "rotary_emb_base", "fraction": "rotary_pct"}
_GEMMA3 = {"local": "rope_local_base_freq"}
_MODERNBERT = {"theta": "global_rope_theta", "local": "local_rope_theta", "scaling": None}
_NAMES = {
    "gpt_neox": _NEOX, "gpt_neox_japanese": _NEOX, "gemma3": _GEMMA3, "gemma3_text": _GEMMA3, "gemma3n_text": _GEMMA3,
    "modernbert": _MODERNBERT, "modernbert-decoder": _MODERNBERT,
}  # fmt: skip
"""Model types with other names. `local`: theta of layers that see a window alone; None: no place for it."""

_RENAMED = {"qwen3_moe": {"num_experts": "num_local_experts"}, "qwen3_vl_moe_text": {"num_experts": "num_local_experts"}}
"""Other settings that transformers 5 writes under a new name alone, by model type: the older name and the new one."""

_TYPE_AND_FACTOR = ("olmo", "olmo2", "chameleon", "fuyu")
"""Model types that take nothing but `type` and `factor` for scaling; all others take `rope_type`."""


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON, with transformers 4's names next to transformers 5's, in its parts as well. Pure."""
    result = {key: with_older_keys(value) if _is_part(value) else _plain(value) for key, value in config.items()}
    for older, newer in _RENAMED.get(str(result.get("model_type")), {}).items():
        if newer in result:
            result[older] = result[newer]
    rope = result.get("rope_parameters")
    if isinstance(rope, Mapping) and rope:
        result |= _older_rope(rope, str(result.get("model_type")))
    if "dtype" in result:
        result["torch_dtype"] = result["dtype"]
    return result


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "model_type" in value


def _plain(value: Any) -> Any:
    """A value with infinities as Python's JSON has them, where transformers 5 writes `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(each) for k, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _older_rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """RoPE parameters, of all layers or by layer type, as transformers 4 names them."""
    by_layer = {layers: each for layers, each in rope.items() if isinstance(each, Mapping)}
    main = by_layer.get(_GLOBAL) or next(iter(by_layer.values()), None) or rope
    local = by_layer.get(_LOCAL, {})
    names = {"theta": "rope_theta", "local": None, "fraction": "partial_rotary_factor", "scaling": "rope_scaling"}
    names |= _NAMES.get(model_type, {})
    found = {
        "theta": main.get("rope_theta"),
        "local": local.get("rope_theta"),
        "fraction": main.get("partial_rotary_factor"),
    }
    older = {name: found[what] for what, name in names.items() if name and found.get(what) is not None}
    if names["scaling"]:
        older[names["scaling"]] = _scaling(main, model_type)
    return older


def _scaling(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    scaling = {key: value for key, value in rope.items() if key not in _NOT_SCALING}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.keys() <= {"rope_type", "type"} and kind == "default":
        return None
    if model_type in _TYPE_AND_FACTOR and kind in ("linear", "dynamic"):
        return {"type": kind, "factor": float(scaling["factor"])}
    return {**scaling, "rope_type": kind}


_FILLED_IN = ("bos_token", "eos_token", "unk_token")
"""Special tokens that classes of transformers 4 (GPT2Tokenizer) have a value for where the file doesn't say `null`."""


def older_tokenizer_config(
    saved: Mapping[str, Any], base: Mapping[str, Any], adds: Mapping[str, bool], chat_template: str | Mapping[str, str] | None
) -> dict[str, Any]:
    """A `tokenizer_config.json` that transformers 4 opens as well. Pure.

    Args:
        saved: as transformers 5 writes it.
        base: the base's own file, as far as it is known.
        adds: `add_bos_token` and `add_eos_token` as the tokenizer really does; transformers 4's classes look at these.
        chat_template: one, or several by name; it stays in its own file, too.
    """
    result = dict.fromkeys(_FILLED_IN) | dict(saved)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = base.get("tokenizer_class", "PreTrainedTokenizerFast")
        if result["tokenizer_class"] == "TokenizersBackend":
            result["tokenizer_class"] = "PreTrainedTokenizerFast"
    listed, named = result.pop("extra_special_tokens", None), result.pop("model_specific_special_tokens", None)
    if isinstance(listed, list) and listed:
        result["additional_special_tokens"] = listed
    elif isinstance(listed, Mapping):
        named = {**listed, **(named or {})}
    if named:
        result["extra_special_tokens"] = named
    result |= {name: adds[name] for name in adds if name in base}
    if isinstance(chat_template, str):
        result["chat_template"] = chat_template
    elif chat_template:
        result["chat_template"] = [{"name": name, "template": text} for name, text in chat_template.items()]
    return result
