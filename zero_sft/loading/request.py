"""The resolved inputs of a load: which model to build, and what to load into it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from zero_sft.loading.options import LoadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The inputs from which a model without weights is built.

    Attributes:
        folder: the local folder of the model, for custom code and for messages.
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
    """The resolved inputs of one load.

    Attributes:
        name: the model's name as the user gave it.
        ds_config: a DeepSpeed config without "auto".
        seed: initialises the weights that the checkpoint lacks; the same on every rank.
        variant: selects the weight files, as in transformers ("fp16" reads `model.fp16.safetensors`).
        while_reading: called on every rank when the reads begin.
    """

    name: str
    model: ModelSpec
    ds_config: Mapping[str, Any]
    seed: int
    variant: str | None
    options: LoadOptions
    while_reading: Callable[[], object] | None = None
