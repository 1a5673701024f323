"""safetensors' names of dtypes as torch's dtypes and back, and host tensors as bytes."""

from typing import Any

import torch

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Stored dtype → torch dtype, for every dtype that torch can cast."""

STORED_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """Return a writable view of the bytes of a contiguous host tensor."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)
