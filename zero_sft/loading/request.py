"""What to build and what to load, fully resolved: the values that the stages of a load are given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from zero_sft.loading.options import LoadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a model without weights is built from.

    Attributes:
        folder: the local folder, for custom code and for messages.
        model_class: a model class or an Auto class; None is `AutoModelForCausalLM`.
    """

    folder: Path
    config: PreTrainedConfig
    dtype: torch.dtype
    model_class: Any = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What to load.

    Attributes:
        name: the model's name as the user gave it.
        ds_config: a DeepSpeed config without "auto".
        seed: for weights that the checkpoint lacks, the same on every rank.
        variant: which files of the weights, as in transformers.
        while_reading: called when the reads begin.
    """

    name: str
    model: ModelSpec
    ds_config: Mapping[str, Any]
    seed: int
    variant: str | None
    options: LoadOptions
    while_reading: Callable[[], object] | None = None
