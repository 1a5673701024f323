"""Tell how well the devices are used: the peak of their memory, and the share of their arithmetic (MFU)."""

from typing import Any

import torch

_TERA = 1e12

PEAK_FLOPS = {
    "H100 PCIe": 756 * _TERA,
    "H100 NVL": 835 * _TERA,
    "H100": 989 * _TERA,
    "H200": 989 * _TERA,
    "H800": 989 * _TERA,
    "GH200": 989 * _TERA,
    "B200": 2250 * _TERA,
    "A100": 312 * _TERA,
    "A800": 312 * _TERA,
    "A40": 150 * _TERA,
    "L40S": 362 * _TERA,
    "L40": 181 * _TERA,
    "MI300X": 1307 * _TERA,
}
"""Operations per second with 16-bit numbers, without sparsity, by a part of the device's name; from the makers' data sheets."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a device; None if it is not known. The longest fitting name counts. Pure."""
    fitting = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def device_name() -> str:
    """Return the name of this rank's GPU; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def peak_memory() -> int | None:
    """Return the most bytes that this rank's allocations have taken on its GPU; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def has_idle_experts(config: Any) -> bool:
    """Return whether a token uses a part of the parameters alone, so that their number does not give the operations. Pure."""
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)
