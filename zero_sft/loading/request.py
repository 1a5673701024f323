"""What to load, fully resolved: the one value that the steps of a load hand on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What a load insists on: no missing or unexpected name; shards read back; or shapes that may differ, to be initialised."""

    strict: bool = False
    verify: bool = False
    ignore_mismatched_sizes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to load, resolved: a local folder, a config, a DeepSpeed config without "auto", the engine's dtype, one seed."""

    folder: Path
    config: PreTrainedConfig
    ds_config: Mapping[str, Any]
    dtype: torch.dtype
    seed: int
    model_class: Any
    attn_implementation: str | None
    trust_remote_code: bool
    variant: str | None
    buffer_mib: int
    mmap: bool
    while_reading: Callable[[], object] | None
    checks: Checks
