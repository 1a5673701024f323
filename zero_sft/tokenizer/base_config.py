"""What a model's own `tokenizer_config.json` says, kept with the tokenizer that a run has set up in another way.

A run needs its own length, transformers renames a tokenizer's class, and drops `legacy`, on which a Llama tokenizer's ids after
a special token depend. The export has the model's own values.
"""

from collections.abc import Mapping
from typing import Any

_ATTRIBUTE = "_zero_sft_base_config"
_KEPT = ("tokenizer_class", "model_max_length", "add_bos_token", "add_eos_token", "legacy")


def keep_base_config(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Remember of `config`, the content of a `tokenizer_config.json`, what an export needs."""
    setattr(tokenizer, _ATTRIBUTE, {name: config[name] for name in _KEPT if name in config})


def base_config(tokenizer: Any) -> Mapping[str, Any]:
    """What was kept; empty for a tokenizer that this package has not set up."""
    return getattr(tokenizer, _ATTRIBUTE, {})
