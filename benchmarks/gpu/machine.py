"""Record the machine: GPU, host, versions, and the datasheet and measured TFLOP/s as references for the other parts."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.gpu.settings import Settings, keep

_PACKAGES = ("torch", "transformers", "deepspeed", "trl", "accelerate", "datasets", "pyarrow", "numpy", "triton", "flash-attn",
             "pytest")  # fmt: skip

DATASHEET_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}
"""Dense bf16 TFLOP/s by a part of the GPU's name; the first match counts."""


def main() -> None:
    """Save the facts that need no device first, then those that do."""
    settings = Settings.read()
    facts = {
        "python": platform.python_version(), "kernel": platform.release(), "cores": len(os.sched_getaffinity(0)),
        "cpu": _first("/proc/cpuinfo", "model name"), "memory": _first("/proc/meminfo", "MemTotal"),
        "disk_free_gib": round(shutil.disk_usage(settings.work).free / 2**30),
        "disk": _file_system(Path(settings.work)),
        "compilers": {name: shutil.which(name) or "none" for name in ("nvcc", "gcc")},
        "packages": {name: _version(name) for name in _PACKAGES}, "cuda": torch.version.cuda or "none",
        "attentions": _attentions(), "device": "cpu",
    }  # fmt: skip
    keep("machine", facts)
    if torch.cuda.is_available():
        facts |= {"device": torch.cuda.get_device_name(0), "driver": _driver(),
                  "device_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}  # fmt: skip
        facts["datasheet_tflops"] = next((tflops for name, tflops in DATASHEET_TFLOPS.items() if name in facts["device"]), None)
        keep("machine", facts)
        facts["matmul_tflops"] = _matmul_tflops()
    keep("machine", facts)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _attentions() -> dict[str, bool]:
    """Check which attention implementations are available."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    return {
        "flash_attention_2": bool(is_flash_attn_2_available()),
        "flex_attention": bool(is_torch_flex_attn_available()) and torch.cuda.is_available(),
    }


def _matmul_tflops(width: int = 8192, times: int = 10) -> float:
    """Measure bf16 products of random matrices, and return the median."""
    left, right = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(3 + times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / sorted(seconds[3:])[times // 2] / 1e12


def _first(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "?")


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds a folder."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding)[1] if holding else "?"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "?"


if __name__ == "__main__":
    main()
