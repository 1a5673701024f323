"""Populate fresh memory just before it is filled, with the page size that is currently faster.

A read into untouched anonymous memory causes a page fault for every page, which costs more than the copy.
`MADV_POPULATE_WRITE` (Linux 5.14) populates a range in one call. In blocks of a few MiB, the zeroed pages are still in the
processor's cache when the data arrives.
Small or huge pages may be faster. In a virtual machine, within one minute, huge pages were 2.5 times faster where the
hypervisor still backed the memory, and 4 times slower where it had reclaimed it. So every block is timed, the next block uses
the size that was faster in the last ones, and the other size is tried again from time to time.
Contents never change, so a kernel without the call only loses time.
"""

import collections
import ctypes
import mmap
import time
from collections.abc import Iterator

import torch

BLOCK_BYTES = 4 * 2**20
"""Bytes that are populated and then filled in one step: a multiple of the huge page size that fits a core's cache share."""

TRIAL_EVERY = 64
"""Number of blocks after which one block retries the currently slower page size; this costs 2 to 5 %."""

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = 14, 15, 23


class Pages:
    """The blocks that one load has populated, and the recent times of both page sizes. Threads may share it."""

    def __init__(self) -> None:
        self._madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
        self._present: set[int] = set()
        self._seconds: dict[int, collections.deque[float]] = {
            advice: collections.deque(maxlen=2) for advice in (_MADV_NOHUGEPAGE, _MADV_HUGEPAGE)
        }  # seconds of the last blocks, by page size
        self._trials = 0

    def parts(self, memory: torch.Tensor) -> Iterator[slice]:
        """Split a contiguous host tensor of bytes into slices of at most a block. Each is populated when it is yielded."""
        start, position, nbytes = memory.data_ptr(), 0, memory.numel()
        low, high = _bounds(memory)
        while position < nbytes:
            block = (start + position) // BLOCK_BYTES
            end = min(nbytes, (block + 1) * BLOCK_BYTES - start)
            self._populate_block(block, low, high)
            yield slice(position, end)
            position = end

    def make_present(self, memory: torch.Tensor) -> None:
        """Populate the blocks that a contiguous host tensor overlaps, within its storage."""
        start = memory.data_ptr()
        stop = start + memory.numel() * memory.element_size()
        low, high = _bounds(memory)
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            self._populate_block(block, low, high)

    def _populate_block(self, block: int, low: int, high: int) -> None:
        """Populate block number `block` once, within the addresses `[low, high)`."""
        if block not in self._present and self._madvise is not None:
            self._present.add(block)
            begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            self._populate(max(low, begin), min(high, end), is_complete=low <= begin and end <= high)

    def _populate(self, begin: int, end: int, is_complete: bool) -> None:
        """Populate the addresses `[begin, end)`. Only a complete block may use huge pages, and only its time counts."""
        advice = self._choose_page_size() if is_complete else _MADV_NOHUGEPAGE
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        started = time.perf_counter()
        self._advise(begin, end, advice)  # fails without effect if the kernel has no huge pages
        if self._advise(begin, end, _MADV_POPULATE_WRITE):
            self._madvise = None
        elif is_complete:
            self._seconds[advice].append(time.perf_counter() - started)

    def _choose_page_size(self) -> int:
        """Choose the page size of the next block: an untried one, else the faster one, and every n-th time the slower one."""
        self._trials += 1
        # The faster of the last two blocks counts, because other work on the machine can slow down a single block.
        faster, slower = sorted(self._seconds, key=lambda advice: min(self._seconds[advice], default=0.0))
        return slower if self._trials % TRIAL_EVERY == 0 else faster

    def _advise(self, begin: int, end: int, advice: int) -> int:
        madvise = self._madvise
        return madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) if madvise else -1


def _bounds(memory: torch.Tensor) -> tuple[int, int]:
    """Return the addresses [first, end) of a tensor's storage."""
    storage = memory.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
