"""What the page cache holds already is memory already: shards that are taken from a file in place, without a copy.

A shard that is one run of a file's bytes, in the wanted dtype, and is to stay in ordinary host memory, can be the mapped file
itself: private, so that a write copies the page that it touches and never reaches the file. That is as good as a copy until
an engine starts, when what is mapped is copied (`zero.gather.settle`), and takes milliseconds where a copy takes as long as
the memory needs to be touched and filled. Only what is in the page cache is taken so: from a disk, large reads are
faster than faults. Whoever overwrites a mapped file in place changes the shards, and whoever cuts it short ends the processes
that touch what is gone (SIGBUS); a file that is replaced leaves them.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from zero_sft.checkpoint.stamp import Stamp
from zero_sft.plan.plan import Read
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.storage.reader import opened

SAMPLE_BYTES = 2**20
"""One byte of so many is looked for in the page cache. It keeps a file in far larger parts than pages, or lets them go."""

SMALLEST_BYTES = 2**18
"""A smaller shard is copied: that costs no more than a mapping of its own."""

LIMIT = 2**14
"""The most mappings that a process has at a time, of all its loads. Linux gives it 65,530 for everything."""

_live: set[int] = set()  # where mappings that are in use begin

_MADV_POPULATE_READ = 22  # Linux 5.14
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_cached(
    reads: Iterable[Read], wanted: Mapping[str, tuple[int, torch.dtype]], stamps: Mapping[str, Stamp]
) -> dict[str, torch.Tensor]:
    """Map what can be had in place of `wanted`, (numel, dtype) by target; the rest has to be read.

    Where the kernel can't tell what it holds without waiting for it (`RWF_NOWAIT`: network file systems, other systems than
    Linux), nothing can.

    Args:
        stamps: by path, which file it was when the reads were planned.

    Returns:
        Flat tensors by target, each with a storage of its own that keeps the mapping.

    Raises:
        CheckpointError: a file that can't be opened, or is no longer the one that was planned.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return {}
    reads = [read for read in reads if read.target in wanted]
    times = Counter(read.target for read in reads)
    by_file: dict[str, list[Read]] = {}
    for read in reads:
        if times[read.target] == 1 and _is_whole(read, *wanted[read.target]):
            by_file.setdefault(read.file, []).append(read)
    found: dict[str, torch.Tensor] = {}
    for path, each in by_file.items():
        with opened(path, stamps.get(path)) as handle:
            for read in each:
                if len(_live) < LIMIT and _is_cached(handle, read) and (shard := _map(handle, read)) is not None:
                    found[read.target] = shard
    return found


def _is_whole(read: Read, numel: int, dtype: torch.dtype) -> bool:
    """True if the bytes of one read are all of a shard, padding too, as it is wanted."""
    return (
        read.is_run
        and read.scales is None
        and TORCH_DTYPES[read.dtype] == dtype
        and SMALLEST_BYTES <= read.nbytes == numel * dtype.itemsize
        and read.offset_bytes % dtype.itemsize == 0
    )


def _is_cached(handle: int, read: Read) -> bool:
    byte = bytearray(1)
    stop = read.offset_bytes + read.nbytes
    with contextlib.suppress(OSError):  # it would have to wait, or can't tell
        return all(
            os.preadv(handle, [byte], offset, os.RWF_NOWAIT)
            for offset in (*range(read.offset_bytes, stop, SAMPLE_BYTES), stop - 1)
        )
    return False


def _map(handle: int, read: Read) -> torch.Tensor | None:
    """Map the pages of one read, no others: where the cache holds the file in huge pages, a fault brings in all of one.

    None where the kernel refuses (strict overcommit, a limit of the process). Python's own `mmap` keeps a file descriptor for
    each mapping, of which a process may have but a thousand.
    """
    dtype = TORCH_DTYPES[read.dtype]
    skip = read.offset_bytes % mmap.PAGESIZE
    length = skip + read.nbytes
    address = _libc().mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, handle, read.offset_bytes - skip)
    if address == _MAP_FAILED:
        return None
    memory = (ctypes.c_char * length).from_address(address)
    _live.add(address)
    weakref.finalize(memory, _unmap, address, length).atexit = False
    _libc().madvise(address, length, _MADV_POPULATE_READ)  # an older kernel refuses, and brings pages in at their first use
    return torch.frombuffer(memory, dtype=dtype, count=read.nbytes // dtype.itemsize, offset=skip)


def _unmap(address: int, length: int) -> None:
    _live.discard(address)
    _libc().munmap(address, length)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
