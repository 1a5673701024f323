"""Decide the dtype of the weights: the DeepSpeed engine's, since DeepSpeed trains parameters in that dtype only."""

import torch
from transformers import PreTrainedConfig

from zero_sft.errors import ArgumentError


def wanted_dtype(dtype: object, config: PreTrainedConfig) -> str:
    """The name of the dtype that was asked for; "auto" is the config's own, as in `from_pretrained`."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"dtype must be 'auto', a torch dtype or its name, got {dtype!r}", code="arguments.wrong_value")
    return str(found).removeprefix("torch.")  # torch.half is another name of torch.float16


def require_engine_dtype(dtype: object, asked: str, engine: str) -> None:
    """Raise `ArgumentError` if a dtype was asked for (not "auto") that is not the engine's."""
    if dtype != "auto" and asked != engine:
        raise ArgumentError(
            f"dtype {asked} was asked for, but this DeepSpeed config trains parameters in {engine}. Set bf16.enabled or "
            'fp16.enabled in it to match (or to "auto"), or leave dtype at "auto".',
            code="arguments.dtype_contradicts_engine",
        )
