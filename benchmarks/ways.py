"""Load a checkpoint with one loader as one rank, and write the measurements to a file.

The roofline is the bare read: the rank reads its share of the files' bytes into fresh anonymous memory and does nothing else.
It has a variant for each kind of pages, with one and with two threads. A "way" is a loader, or a variant of the bare read.
"""

import ctypes
import json
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import weight_files

ROOFLINES = {f"bare read, {pages} pages, {n} thread{'s' * (n > 1)}": (pages, n)
             for pages in ("plain", "huge", "populated") for n in (1, 2)}  # fmt: skip
OURS, STOCK = "zero_sft", "transformers"
DS_CONFIG = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}

_READ_BYTES = 32 * 2**20
_MADV_POPULATE_WRITE = 23
_ATTEMPTS = 5


def rank_main(way: str, folder: Path, out: Path) -> None:
    """Load with `way` between two barriers, and write `<rank>.json` into `out`. Every rank; communicates."""
    import torch.distributed as dist

    from testing import probes
    from zero_sft.cluster.world import World
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    action = loader_function(way)
    if world.rank == 0:
        settle_memory(3 * sum(path.stat().st_size for path in weight_files(folder)) // 2)
    dist.barrier()
    reads_before, loopback_before = probes.reads(), probes.loopback_bytes()
    with probes.PeakMemory() as memory:
        start = time.perf_counter()
        loaded = action(folder, world)
        seconds = time.perf_counter() - start
    dist.barrier()
    reads_after = probes.reads()
    report = getattr(loaded, "load_report", None)
    result = {
        "seconds": seconds,
        "read": reads_after.nbytes - reads_before.nbytes,
        "requests": reads_after.calls - reads_before.calls,
        "loopback": probes.loopback_bytes() - loopback_before,
        "memory": memory.growth,
        "file_memory": memory.file_growth,
        "stages": report.stages if report else {},
        "taken": report.bytes_read if report else 0,
    }
    (out / f"{world.rank}.json").write_text(json.dumps(result))


def loader_function(way: str) -> Any:
    """Return the function of a way, after its imports and transformers' work once per process, which are not measured."""
    from benchmarks.rivals import RIVALS, available

    if way in ROOFLINES:
        pages, threads = ROOFLINES[way]
        return lambda folder, world: bare_read(folder, world, pages, threads)
    if way in RIVALS:
        available()
        return RIVALS[way]
    import deepspeed.runtime.zero.stage3
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.llama import modeling_llama
    from transformers.models.mixtral import modeling_mixtral

    from zero_sft import load_model

    assert all((deepspeed, modeling_llama, modeling_mixtral))
    for model_type in ("llama", "mixtral"):
        get_checkpoint_conversion_mapping(model_type)
    options = {OURS: {}, STOCK: {"loader": "stock"}}[way]
    return lambda folder, world: load_model(str(folder), ds_config=DS_CONFIG, **options)


def bare_read(folder: Path, world: Any, pages: str, threads: int) -> object:
    """Read this rank's share of every file in large positioned reads. Any rank; does not communicate."""
    buffers = []
    for path in weight_files(folder):
        size = path.stat().st_size
        share = -(-size // world.world_size)
        start, stop = min(world.rank * share, size), min((world.rank + 1) * share, size)
        if start < stop:
            buffers.append(_read_range(path, start, stop, pages, threads))
    return buffers


def _read_range(path: Path, start: int, stop: int, pages: str, threads: int) -> mmap.mmap:
    populate = mmap.MAP_POPULATE if pages == "populated" else 0
    memory = mmap.mmap(-1, stop - start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate)
    if pages == "huge":
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    handle = os.open(path, os.O_RDONLY)
    part_bytes = -(-len(view) // threads)

    def read(part_start: int, part_stop: int) -> None:
        while part_start < part_stop:
            target = view[part_start : min(part_stop, part_start + _READ_BYTES)]
            part_start += os.preadv(handle, [target], start + part_start)

    parts = [(i * part_bytes, min((i + 1) * part_bytes, len(view))) for i in range(threads)]
    workers = [threading.Thread(target=read, args=part) for part in parts[1:]]
    for worker in workers:
        worker.start()
    read(*parts[0])
    for worker in workers:
        worker.join()
    os.close(handle)
    return memory


def residency(path: Path) -> float:
    """Return the fraction of a file that is in the page cache, from 0 to 1, by mincore."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags
        )
        del anchor
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(bytes(flags).count(value) for value in range(1, 256, 2)) / pages


def settle_memory(nbytes: int) -> None:
    """Touch `nbytes` of memory in a child process that exits at once.

    A hypervisor takes back free memory after two seconds. The next process that touches it waits, up to five times as long as
    the load takes. After this call every loader finds free memory as on a machine without a hypervisor.
    """
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)
        os._exit(0)
    os.waitpid(child, 0)


def prepare_cache(folder: Path, warm: bool) -> None:
    """Bring all weights into the page cache, or evict them from it.

    Raises:
        RuntimeError: the kernel did not follow.
    """
    for path in weight_files(folder):
        for _ in range(_ATTEMPTS):  # the kernel may evict some pages of a file while it is read
            if _is_prepared(path, warm):
                break
            with path.open("rb", buffering=0) as file:
                if warm:
                    while file.read(2**24):
                        pass
                else:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not _is_prepared(path, warm):
            expected = "all" if warm else "none"
            raise RuntimeError(f"{residency(path):.1%} of {path} is in the page cache, expected {expected} of it")


def _is_prepared(path: Path, warm: bool) -> bool:
    """Check the state with a tolerance of 1 %, since some kernels evict a few cold pages all the time."""
    return residency(path) > 0.99 if warm else residency(path) < 0.01
