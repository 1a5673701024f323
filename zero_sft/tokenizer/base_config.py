"""Keep settings of a model's `tokenizer_config.json` with its tokenizer, so that the export can restore them.

A run sets another length. transformers renames the tokenizer's class and drops `legacy`, on which the ids of a Llama tokenizer
after a special token depend. The export has the values of the model's file.
"""

from collections.abc import Mapping
from typing import Any

_ATTRIBUTE = "_zero_sft_base_config"
_KEPT_KEYS = ("tokenizer_class", "model_max_length", "add_bos_token", "add_eos_token", "legacy")


def keep_base_config(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Keep the settings that an export needs; `config` is the content of a `tokenizer_config.json`."""
    setattr(tokenizer, _ATTRIBUTE, {name: config[name] for name in _KEPT_KEYS if name in config})


def base_config(tokenizer: Any) -> Mapping[str, Any]:
    """Return the kept settings; empty for a tokenizer that this package has not set up."""
    return getattr(tokenizer, _ATTRIBUTE, {})
