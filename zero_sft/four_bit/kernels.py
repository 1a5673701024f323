"""Quantise and dequantise with bitsandbytes: the functions of it that this package uses, in this one place.

Imports bitsandbytes; so only functions import this module.
"""

import torch
from bitsandbytes import functional

from zero_sft.four_bit.layout import BLOCK, SCALE_BLOCK, FourBitLayout


def quantize(values: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise flat values block by block; return the codes (uint8, two in a byte) and each block's scale (fp32)."""
    codes, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type=quant_type)
    return codes.view(-1), state.absmax


def scale_bytes(scales: torch.Tensor, layout: FourBitLayout) -> torch.Tensor:
    """Return the bytes of a weight's scales (uint8), as they follow the codes.

    Args:
        scales: of all blocks (fp32).
    """
    if not layout.double:
        return scales.view(torch.uint8)
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK)
    return torch.cat([codes.view(-1), state.absmax.view(torch.uint8), mean.view(1).view(torch.uint8)])


def dequantize(stored: torch.Tensor, layout: FourBitLayout, quant_type: str, dtype: torch.dtype) -> torch.Tensor:
    """Compute a weight from all of its bytes.

    Args:
        stored: the bytes, in the parameter's dtype.
        dtype: the result's dtype.
    """
    everything = stored.view(torch.uint8)
    codes, *parts = everything[: layout.nbytes].split([layout.code_bytes, *layout.scale_parts])
    if codes.data_ptr() % BLOCK:  # after a gather of several parameters, the bytes may begin anywhere
        codes = codes.clone()
    if layout.double:
        scale_codes, scales, mean = parts
        nested = functional.QuantState(
            absmax=_fp32(scales), code=_scale_code(stored.device), blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        absmax, doubled = scale_codes.clone(), {"state2": nested, "offset": _fp32(mean)[0]}
    else:
        absmax, doubled = _fp32(parts[0]), {}
    state = functional.QuantState(
        absmax=absmax, shape=torch.Size(layout.shape), dtype=dtype, blocksize=BLOCK, quant_type=quant_type,
        code=functional.get_4bit_type(quant_type, device=stored.device), **doubled,
    )  # fmt: skip
    return functional.dequantize_4bit(codes.view(-1, 1), state)


def _fp32(part: torch.Tensor) -> torch.Tensor:
    """Return bytes as fp32, copied, since they may begin anywhere."""
    return part.clone().view(torch.float32)


_codes: dict[torch.device, torch.Tensor] = {}


def _scale_code(device: torch.device) -> torch.Tensor:
    """Return the values of the 8-bit codes of scales, on a device."""
    if device not in _codes:
        _codes[device] = functional.create_dynamic_map().to(device)
    return _codes[device]
