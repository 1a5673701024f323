"""Quantised checkpoints: transformers' quantizer in its dequantising mode, traced where possible.

Every format that transformers can dequantise while loading is supported: its quantizer adds operations to the conversion rules.
8-bit floats with a grid of scales (DeepSeek-V3's layout) are dequantised element by element, so those operations are traced.
The result is a `ScaledTensor`, of which a rank reads only the blocks that cover its range. All other operations run on whole
tensors.
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
    """Return transformers' quantizer for a config of quantised weights, set to dequantise; None for plain weights.

    Args:
        where: the source of the config, for error messages.

    Raises:
        CheckpointError: transformers can't dequantise the format, or needs a missing package for it.
    """
    settings = _quantization_config(config)
    if not settings:
        return None
    if not isinstance(settings, dict) and not hasattr(settings, "quant_method"):
        raise CheckpointError(
            f"{where}: quantization_config is {settings!r}; expected a section with a quant_method, as transformers writes it.",
            code="checkpoint.bad_quantization_config",
        )
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = getattr(method, "value", method)
    refusal = CheckpointError(
        f"{where} is quantised ({method}), which transformers can't dequantise while loading, and training needs plain "
        "weights. Use the model's unquantised checkpoint.",
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
            f"{where} is quantised ({method}), and a package that dequantising needs is missing: {error}",
            code="checkpoint.quantization_needs_package",
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is quantised ({method}) in a format that transformers does not know: {error}",
            code="checkpoint.quantization_unknown",
        ) from error
    return quantizer


def _quantization_config(config: PreTrainedConfig) -> Any:
    """Return the `quantization_config` of a config, or of its text part, as transformers looks it up."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        return settings
    try:
        return getattr(config.get_text_config(decoder=True), "quantization_config", None)
    except ValueError:  # the config has several text parts
        return None


def remove_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove `quantization_config` from a config and its sub-configs, in place."""
    for part in config_parts(config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def config_parts(config: PreTrainedConfig) -> list[Any]:
    """Return a config and its sub-configs."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in parts if part is not None)]


def needs_stored_dtype(converter: Any) -> bool:
    """True if a converter's operations need tensors in their stored dtype instead of the model's."""
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in converter.operations)


def configured_block_shape(quantizer: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block according to the checkpoint's config; None if it does not set them."""
    size = getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None)
    return (int(size[0]), int(size[1])) if size else None


class DequantTracer:
    """Replace the arithmetic of `Fp8Dequantize` in a trace, and collect the pairs of weight and scales in `scaled`, by name."""

    def __init__(self, stored: Mapping[str, StoredTensor], quantizer: Any) -> None:
        self._stored = stored
        self._configured = configured_block_shape(quantizer)
        self.scaled: dict[str, ScaledTensor] = {}

    def install(self, converter: Any) -> None:
        """Make the dequantising operations of `converter` record weight and scales instead of multiplying them."""
        _set_arithmetic(converter, lambda _: self._record)

    def _record(self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        weight, grid = self._stored_tensor(quantized), self._stored_tensor(scales)
        if not weight.dtype.startswith("F8"):
            raise tracing.NotTraceable(f"{weight.name} is stored as {weight.dtype}, with several numbers per byte")
        name = f"{weight.name} * {grid.name}"
        block = block_shape(weight.shape, grid.shape, self._configured)
        self.scaled[name] = ScaledTensor.join(name, weight, grid, block)
        return tracing.trace_stored(name, weight.shape, output_dtype or quantized.dtype)

    def _stored_tensor(self, tensor: torch.Tensor) -> StoredTensor:
        """Return the stored tensor that a traced tensor is in full."""
        if not isinstance(tensor, tracing.TracedTensor) or len(tensor.regions) != 1:
            raise tracing.NotTraceable("scales of a tensor that does not come from one stored tensor")
        stored = self._stored[tensor.regions[0].source]
        if stored.strides is not None or tuple(tensor.shape) != stored.shape:
            raise tracing.NotTraceable(f"scales of {stored.name}, which is not stored row by row")
        return stored


def dequantize(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise with transformers' arithmetic: (rows, cols) of 8-bit floats and a grid of scales → (rows, cols) of `dtype`."""
    return dequantize_function(internal("Fp8Dequantize")(None))(weight, scales, output_dtype=dtype)


def use_configured_blocks(converter: Any) -> None:
    """Make a converter's dequantising operations use the block size of the config; transformers infers it from the shapes."""
    _set_arithmetic(converter, _on_complete_blocks)


def _set_arithmetic(converter: Any, make: Callable[[Any], Callable[..., torch.Tensor]]) -> None:
    """Replace the arithmetic of each `Fp8Dequantize` of a converter by `make(operation)`."""
    for operation in converter.operations:
        if isinstance(operation, internal("Fp8Dequantize")):
            set_dequantize_function(operation, make(operation))


def _on_complete_blocks(operation: Any) -> Callable[..., torch.Tensor]:
    """Return transformers' arithmetic on complete blocks: a weight with incomplete ones is padded, and the result is cut."""
    original, configured = dequantize_function(operation), configured_block_shape(operation.hf_quantizer)

    def dequantize_padded(
        quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        is_matrix = quantized.dim() == 2 and quantized.is_floating_point() and quantized.itemsize == 1
        if not is_matrix or scales.numel() == 1:
            return original(quantized, scales, output_dtype=output_dtype)
        (height, width), (grid_rows, grid_cols) = quantized.shape, (1, *scales.shape)[-2:]
        rows, cols = block_shape(tuple(quantized.shape), tuple(scales.shape), configured)
        padded = torch.zeros(grid_rows * rows, grid_cols * cols, dtype=torch.uint8, device=quantized.device)
        padded[:height, :width] = quantized.view(torch.uint8)
        return original(padded.view(quantized.dtype), scales, output_dtype=output_dtype)[:height, :width]

    return dequantize_padded
