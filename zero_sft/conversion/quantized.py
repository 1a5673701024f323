"""Quantised checkpoints: transformers' quantizer in its dequantising mode, and which of its work is local.

Everything that transformers can dequantise while it loads is: its quantizer adds operations to the conversion rules. 8-bit
floats with a grid of scales (DeepSeek-V3's layout) are local, element for element, so those operations are traced: the result
is a `ScaledTensor`, of which a rank reads the blocks that cover its range. The others run on whole tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.scaled import ScaledTensor, block_shape
from zero_sft.conversion import tracing
from zero_sft.errors import CheckpointError
from zero_sft.transformers_internals import dequantize_function, internal, set_dequantize_function


def quantizer_for(config: PreTrainedConfig, where: str) -> Any:
    """transformers' quantizer for a config that says its weights are quantised, set to dequantise; None for plain weights.

    Raises:
        CheckpointError: a format that transformers does not dequantise, or not without a package that is missing.
    """
    settings = _settings(config)
    if not settings:
        return None
    if not isinstance(settings, dict) and not hasattr(settings, "quant_method"):
        raise CheckpointError(
            f"{where}: quantization_config is {settings!r}; expected what transformers writes, with a quant_method.",
            code="checkpoint.bad_quantization_config",
        )
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = getattr(method, "value", method)
    refusal = CheckpointError(
        f"{where} is quantised ({method}), which transformers can't dequantise while loading; training needs plain weights. "
        "Take the model's unquantised checkpoint.",
        code="checkpoint.quantization_unsupported",
    )
    try:
        if isinstance(settings, dict):
            settings = internal("AutoQuantizationConfig").from_dict(dict(settings))
        if not hasattr(settings, "dequantize"):
            raise refusal
        settings.dequantize = True
        quantizer = internal("AutoHfQuantizer").from_config(settings, pre_quantized=True)
        if "dequantize" not in quantizer.get_load_operations():
            raise refusal
    except ImportError as error:
        raise CheckpointError(
            f"{where} is quantised ({method}), and dequantising it needs a package: {error}",
            code="checkpoint.quantization_needs_package",
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is quantised ({method}) in a way that transformers doesn't know: {error}",
            code="checkpoint.quantization_unknown",
        ) from error
    return quantizer


def _settings(config: PreTrainedConfig) -> Any:
    """The config's own, or that of its text part, as transformers looks for it."""
    own = getattr(config, "quantization_config", None)
    if own:
        return own
    try:
        return getattr(config.get_text_config(decoder=True), "quantization_config", None)
    except ValueError:  # several text parts
        return None


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` without its word that weights are quantised; changed in place."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def needs_stored_dtype(converter: Any) -> bool:
    """True if a converter's operations want what is stored as it is stored, not cast to the model's dtype."""
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in converter.operations)


def configured_blocks(quantizer: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, if the checkpoint's config says."""
    size = getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None)
    return (int(size[0]), int(size[1])) if size else None


class DequantTracer:
    """Stands in for the arithmetic of `Fp8Dequantize` while its operation is traced, and collects what it joins."""

    def __init__(self, stored: Mapping[str, StoredTensor], quantizer: Any) -> None:
        self._stored = stored
        self._configured = configured_blocks(quantizer)
        self.joined: dict[str, ScaledTensor] = {}

    def install(self, converter: Any) -> None:
        """Make the dequantising operations of a converter's copy join provenances."""
        _set_arithmetic(converter, lambda _: self._join)

    def _join(self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        weight, grid = self._whole(quantized), self._whole(scales)
        if not weight.dtype.startswith("F8"):
            raise tracing.NotTraceable(f"{weight.name} is stored as {weight.dtype}, several numbers a byte")
        name = f"{weight.name} * {grid.name}"
        block = block_shape(weight.shape, grid.shape, self._configured)
        self.joined[name] = ScaledTensor.join(name, weight, grid, block)
        return tracing.source(name, weight.shape, output_dtype or quantized.dtype)

    def _whole(self, tensor: torch.Tensor) -> StoredTensor:
        if not isinstance(tensor, tracing.TracedTensor) or len(tensor.regions) != 1:
            raise tracing.NotTraceable("scales of a tensor that is not stored in one piece")
        stored = self._stored[tensor.regions[0].source]
        if stored.strides is not None or tuple(tensor.shape) != stored.shape:
            raise tracing.NotTraceable(f"scales of {stored.name}, which is not stored row by row")
        return stored


def dequantize(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """transformers' own arithmetic: (rows, cols) of 8-bit floats and a grid of scales that divides them → that dtype."""
    return dequantize_function(internal("Fp8Dequantize")(None))(weight, scales, output_dtype=dtype)


def apply_block_scales(converter: Any) -> None:
    """Let a converter's dequantising operations take the blocks that the config names, where transformers infers others."""
    _set_arithmetic(converter, _by_blocks)


def _set_arithmetic(converter: Any, make: Callable[[Any], Callable[..., torch.Tensor]]) -> None:
    """Give each `Fp8Dequantize` of a converter the arithmetic that `make` makes of it."""
    for operation in converter.operations:
        if isinstance(operation, internal("Fp8Dequantize")):
            set_dequantize_function(operation, make(operation))


def _by_blocks(operation: Any) -> Callable[..., torch.Tensor]:
    """transformers' own arithmetic on whole blocks: a weight that ends within one is filled up, and cut again."""
    theirs, configured = dequantize_function(operation), configured_blocks(operation.hf_quantizer)

    def dequantize(quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        is_matrix = quantized.dim() == 2 and quantized.is_floating_point() and quantized.itemsize == 1
        if not is_matrix or scales.numel() == 1:
            return theirs(quantized, scales, output_dtype=output_dtype)
        (height, width), (grid_rows, grid_cols) = quantized.shape, (1, *scales.shape)[-2:]
        rows, cols = block_shape(tuple(quantized.shape), tuple(scales.shape), configured)
        padded = torch.zeros(grid_rows * rows, grid_cols * cols, dtype=torch.uint8, device=quantized.device)
        padded[:height, :width] = quantized.view(torch.uint8)
        return theirs(padded.view(quantized.dtype), scales, output_dtype=output_dtype)[:height, :width]

    return dequantize
