"""Load a checkpoint onto the device with several loaders, and compare with the machine's limits: pinned copies and bare reads.

Each loader runs once per round, in a new random order, all in one process. The device is synchronised before the clock starts
and before it stops. Runs with a cold page cache come last, and only if the kernel evicts the files.
"""

import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import weight_files
from benchmarks.gpu.settings import Settings, keep
from benchmarks.ways import prepare_cache

DS_CONFIG = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
COPIES, OURS, OURS_WIDE, STOCK = "pinned copies", "zero_sft", "zero_sft, 16 threads", "transformers"
BARE = "bare read, {} threads"
COLD_WAYS = (OURS, STOCK)
_CHUNK_BYTES = 2**25
_READ_BYTES = 2**23


def main() -> None:
    """Run all rounds, and save the results after each run."""
    settings = Settings.read()
    ways = _ways(settings)
    notes: list[str] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cold: dict[str, list[float]] = {name: [] for name in COLD_WAYS}
    result: dict[str, Any] = {"bytes": _nbytes(settings), "seconds": seconds, "cold": cold, "notes": notes, "reports": {}}
    result["cores"] = len(os.sched_getaffinity(0))
    _prepare(settings.folder, True, notes)
    for name, way in ways.items():  # warm-up: imports, the start of the device, page-locked memory
        _timed(way, result, name)
    for number in range(settings.rounds):
        for name in random.Random(number).sample(sorted(ways), len(ways)):
            seconds[name].append(_timed(ways[name], result, name))
            keep("load", result)
    for name in COLD_WAYS:
        if _prepare(settings.folder, False, notes):
            cold[name].append(_timed(ways[name], result, name))
            keep("load", result)
    keep("load", result)


def _ways(settings: Settings) -> dict[str, Callable[[], Any]]:
    from zero_sft import load_model

    folder, nbytes = settings.folder, _nbytes(settings)
    few, many = 4, min(16, len(os.sched_getaffinity(0)))
    return {
        COPIES: lambda: _pinned_copies(nbytes),
        BARE.format(few): lambda: _bare_read(folder, few),
        BARE.format(many): lambda: _bare_read(folder, many),
        OURS: lambda: load_model(str(folder), ds_config=DS_CONFIG),
        OURS_WIDE: lambda: load_model(str(folder), ds_config=DS_CONFIG, buffer_mib=16 * many),
        STOCK: lambda: load_model(str(folder), ds_config=DS_CONFIG, loader="stock"),
    }


def _nbytes(settings: Settings) -> int:
    return sum(path.stat().st_size for path in weight_files(settings.folder))


def _timed(way: Callable[[], Any], result: dict[str, Any], name: str) -> float:
    """Run one load, return its seconds until all data is on the device, and free its memory.

    Memory that is not freed is recorded as `left_on_device_mib`.
    """
    _synchronize()
    start = time.perf_counter()
    loaded = way()
    _synchronize()
    seconds = time.perf_counter() - start
    report = getattr(loaded, "load_report", None)
    if report is not None:
        result["reports"][name] = {
            "stages": report.stages, "host_mib": report.peak_host_bytes / 2**20, "read_mib": report.bytes_read / 2**20,
        }  # fmt: skip
        for param in loaded.parameters():
            param.ds_tensor.data = param.ds_tensor.data.new_empty(0)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        result["left_on_device_mib"] = torch.cuda.memory_allocated() / 2**20
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _pinned_copies(nbytes: int) -> torch.Tensor:
    """Copy `nbytes` to the device from one page-locked buffer."""
    on_gpu = torch.cuda.is_available()
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    source = _buffer()
    for start in range(0, nbytes, _CHUNK_BYTES):
        chunk = target[start : start + _CHUNK_BYTES]
        chunk.copy_(source[: chunk.numel()], non_blocking=True)
    return target


_buffers: list[torch.Tensor] = []


def _buffer() -> torch.Tensor:
    if not _buffers:
        _buffers.append(torch.ones(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
    return _buffers[0]


def _bare_read(folder: Path, threads: int) -> None:
    """Read the files with `preadv` into one buffer per thread: the maximum speed of the page cache or the disk."""
    chunks = [(path, start) for path in weight_files(folder) for start in range(0, path.stat().st_size, _CHUNK_BYTES)]
    handles = {path: os.open(path, os.O_RDONLY) for path in weight_files(folder)}
    queue = iter(chunks)

    def work() -> None:
        view = memoryview(bytearray(_READ_BYTES))
        for path, start in queue:
            stop = min(start + _CHUNK_BYTES, path.stat().st_size)
            while start < stop:
                start += os.preadv(handles[path], [view[: min(_READ_BYTES, stop - start)]], start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for handle in handles.values():
        os.close(handle)


def _prepare(folder: Path, warm: bool, notes: list[str]) -> bool:
    """Warm or empty the page cache. Return False and add a note if the kernel does not follow."""
    try:
        prepare_cache(folder, warm)
    except (RuntimeError, OSError) as error:
        notes.append(f"the page cache can't be made {'warm' if warm else 'cold'}: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
