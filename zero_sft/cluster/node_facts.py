"""Collect what one node has: versions, files, folders, memory, limits. Any rank; does not communicate.

Imports neither torch nor transformers: it has to work where these can't be imported.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from zero_sft.cluster.node_layout import SHARED_MEMORY
from zero_sft.paths import nearest_existing

PACKAGES = ("zero_sft", "torch", "deepspeed", "transformers", "trl", "accelerate", "safetensors", "tokenizers")

_FABRIC = ("NCCL_", "GLOO_", "UCX_", "FI_", "RCCL_")
"""Prefixes of the variables that choose networks and protocols."""

_OURS = ("zero_sft-", "deepspeed_allreduce_buffer_")
"""Beginnings of the names of files that a run makes in shared memory."""


def collect(*, model: Path | None, data: Sequence[Path], output: Path, caches: Mapping[str, Path]) -> dict[str, Any]:
    """Return the facts of this node, as JSON values.

    Args:
        model: the model's folder; None for a hub id.
        data: local files and folders with data.
        output: the output folder, which need not exist.
        caches: folders that are written during the start, by what they are for.
    """
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "model": None if model is None else describe_model(model),
        "data": {str(path): describe_path(path) for path in data},
        "output": describe_folder(output),
        "caches": {name: describe_folder(path) for name, path in caches.items()},
        "memory": psutil.virtual_memory().available,
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "stale": stale_files(),
        "gpus": gpus(),
        "granted_gpus": granted_gpus(os.environ),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_FABRIC)},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries; "" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = ""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_model(folder: Path) -> dict[str, Any]:
    """Return the digest of a model's config, its number of weight files and their bytes; or what is wrong."""
    try:
        config = (folder / "config.json").read_bytes()
        weights = sorted({*folder.glob("*.safetensors"), *folder.glob("*.bin")})
        sizes = [path.stat().st_size for path in weights]
    except OSError as error:
        return {"problem": f"{error.filename or folder}: {error.strerror or error}"}
    if not weights:
        return {"problem": f"{folder} has no weights"}
    return {"config": hashlib.sha256(config).hexdigest()[:12], "files": len(weights), "bytes": sum(sizes)}


def describe_path(path: Path) -> str:
    """Return what is wrong with a file or folder that is to be read; "" for nothing."""
    try:
        if path.is_dir():
            return "" if any(path.iterdir()) else "the folder is empty"
        if path.exists() and not path.is_file():
            return "not a file"
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return the free bytes where a folder is or would be, and what hinders this user from writing there; "" for nothing."""
    try:
        place = nearest_existing(folder)
    except OSError as error:  # a name that is too long
        return {"free": 0, "problem": error.strerror or str(error)}
    if not place.is_dir():
        return {"free": 0, "problem": f"{place} is not a folder"}
    try:
        probe = place / f".zero_sft-preflight-{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
        problem = ""
    except OSError as error:
        problem = error.strerror or str(error)
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return {"free": 0, "problem": error.strerror or str(error)}
    return {"free": usage.free if usage.total else None, "problem": problem}  # some network file systems report no sizes


def stale_files() -> dict[str, int]:
    """Return the number and the bytes of files in shared memory that no process maps and an earlier run has left."""
    count = nbytes = 0
    with contextlib.suppress(OSError):
        mapped = _mapped_files()
        for path in SHARED_MEMORY.iterdir():
            if path.name.startswith(_OURS) and str(path) not in mapped and time.time() - path.stat().st_mtime > 60:
                count, nbytes = count + 1, nbytes + path.stat().st_size
    return {"count": count, "bytes": nbytes}


def _mapped_files() -> set[str]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found |= {region.path for region in process.memory_maps() if region.path.startswith(str(SHARED_MEMORY))}
    return found


def granted_gpus(environ: Mapping[str, str]) -> int:
    """Return the number of GPUs that SLURM has given to this job on this node; 0 if they are not to be used."""
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if re.fullmatch(r"[0-9]{1,4}", count) and environ.get("DS_ACCELERATOR") != "cpu" else 0


def gpus() -> dict[str, Any]:
    """Return the number, kind and driver of NVIDIA GPUs; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
        rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
        if rows:
            return {"count": len(rows), "names": sorted({row[0] for row in rows}), "driver": rows[0][-1]}
    return {}
