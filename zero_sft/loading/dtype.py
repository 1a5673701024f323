"""Decide the dtype of the weights: the DeepSpeed engine's, since DeepSpeed trains parameters in no other."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from zero_sft.ds_config import engine_dtype
from zero_sft.errors import ArgumentError


def requested_dtype(dtype: object, config: PreTrainedConfig) -> str:
    """Return the name of the requested dtype; "auto" means the config's dtype, as in `from_pretrained`."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    torch_dtype = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ArgumentError(f"dtype must be 'auto', a torch dtype or its name, got {dtype!r}", code="arguments.wrong_value")
    return str(torch_dtype).removeprefix("torch.")  # torch.half is an alias of torch.float16


def weights_dtype(dtype: object, config: PreTrainedConfig, ds_config: Mapping[str, Any]) -> str:
    """Return the name of the engine's dtype; raise `ArgumentError` if `dtype` is not "auto" and is another one."""
    requested = requested_dtype(dtype, config)
    engine = engine_dtype(ds_config, requested)
    if dtype != "auto" and requested != engine:
        raise ArgumentError(
            f"dtype {requested} was requested, but this DeepSpeed config trains parameters in {engine}. Set bf16.enabled or "
            'fp16.enabled in it to match (or to "auto"), or leave dtype at "auto".',
            code="arguments.dtype_contradicts_engine",
        )
    return engine
