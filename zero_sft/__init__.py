"""zero_sft: load models under DeepSpeed ZeRO-3 shard by shard, and fine-tune them.

Docstrings say who calls a function. "Every rank": all ranks, at the same point of the program, which is why it may communicate.
"Any rank": each rank for itself; it never waits for other ranks.

This module holds only the public API. Names are imported on first use, so that importing the package imports neither torch
nor DeepSpeed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero_sft.config import prepare_config
    from zero_sft.library.api import load_model, load_pretrained
    from zero_sft.saving.export import save_pretrained
    from zero_sft.tokenizer import load_tokenizer
    from zero_sft.zero.shards import full_shape

__version__ = "0.1.0"

__all__ = ["full_shape", "load_model", "load_pretrained", "load_tokenizer", "prepare_config", "save_pretrained"]

_MODULES = {
    "full_shape": "zero_sft.zero.shards",
    "load_model": "zero_sft.library.api",
    "load_pretrained": "zero_sft.library.api",
    "load_tokenizer": "zero_sft.tokenizer",
    "prepare_config": "zero_sft.config",
    "save_pretrained": "zero_sft.saving.export",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
