"""Add the settings that transformers 4 reads to the files that transformers 5 writes.

transformers 4, vLLM and llama.cpp's converter read RoPE from `rope_theta` and `rope_scaling` at the top level of a config. If
these are missing, they assume theta 10,000 without scaling. transformers 5 moved both into `rope_parameters` and still reads
the old names. An export therefore has both, with the same values. The same holds for the dtype and for former names in
tokenizers.

Everything here runs on rank 0 and does not communicate.
"""

from collections.abc import Mapping
from typing import Any

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
"""Layer types of models with RoPE by layer type. The older config has the values of the first under the usual names."""

_NEOX = {"theta": "rotary_emb_base", "fraction": "rotary_pct"}
_GEMMA3 = {"local": "rope_local_base_freq"}
_MODERNBERT = {"theta": "global_rope_theta", "local": "local_rope_theta", "scaling": None}
_NAMES = {
    "gpt_neox": _NEOX, "gpt_neox_japanese": _NEOX, "gemma3": _GEMMA3, "gemma3_text": _GEMMA3, "gemma3n_text": _GEMMA3,
    "modernbert": _MODERNBERT, "modernbert-decoder": _MODERNBERT,
}  # fmt: skip
"""Names that differ by model type. `local`: theta of the sliding-window layers. None: the older config has no such key."""

_RENAMED = {"qwen3_moe": {"num_experts": "num_local_experts"}, "qwen3_vl_moe_text": {"num_experts": "num_local_experts"}}
"""Other settings that transformers 5 writes only under a new name, by model type: `{older name: new name}`."""

_TYPE_AND_FACTOR = ("olmo", "olmo2", "chameleon", "fuyu")
"""Model types whose scaling is `type` and `factor` only; all others take `rope_type`."""


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with transformers 4's names added, in its sub-configs as well. Pure."""
    result = {key: with_older_keys(value) if _is_config(value) else _plain(value) for key, value in config.items()}
    for older, newer in _RENAMED.get(str(result.get("model_type")), {}).items():
        if newer in result:
            result[older] = result[newer]
    rope = result.get("rope_parameters")
    if isinstance(rope, Mapping) and rope:
        result |= _older_rope(rope, str(result.get("model_type")))
    if "dtype" in result:
        result["torch_dtype"] = result["dtype"]
    return result


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) and "model_type" in value


def _plain(value: Any) -> Any:
    """Return a value with infinities as Python's JSON writes them; transformers 5 writes `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _older_rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return RoPE parameters, of all layers or by layer type, under transformers 4's names."""
    by_layer = {layers: values for layers, values in rope.items() if isinstance(values, Mapping)}
    main = by_layer.get(_GLOBAL) or next(iter(by_layer.values()), None) or rope
    local = by_layer.get(_LOCAL, {})
    names = {"theta": "rope_theta", "local": None, "fraction": "partial_rotary_factor", "scaling": "rope_scaling"}
    names |= _NAMES.get(model_type, {})
    values = {"theta": main.get("rope_theta"), "local": local.get("rope_theta"), "fraction": main.get("partial_rotary_factor")}
    older = {name: values[setting] for setting, name in names.items() if name and values.get(setting) is not None}
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
"""Special tokens for which classes of transformers 4 (GPT2Tokenizer) have a default unless the file says `null`."""


def older_tokenizer_config(
    saved: Mapping[str, Any], base: Mapping[str, Any], adds: Mapping[str, bool], chat_template: str | Mapping[str, str] | None
) -> dict[str, Any]:
    """Return a `tokenizer_config.json` that transformers 4 can also open. Pure.

    Args:
        saved: the file as transformers 5 writes it.
        base: the base model's file, as far as it is known.
        adds: the values of `add_bos_token` and `add_eos_token` by which the tokenizer acts; transformers 4's classes read
            these.
        chat_template: one template, or several by name; its separate file stays as well.
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
