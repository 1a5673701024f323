"""Make fresh memory present just before it is filled, with the page size that is faster here and now.

A read into untouched anonymous memory faults page by page inside the copy, which costs more than the copy.
`MADV_POPULATE_WRITE` (Linux 5.14) brings a range in at once, and in blocks of a few MiB the zeroed pages are still in the
processor's cache when the data arrives. Whether small or huge pages are faster can't be known beforehand: in a virtual
machine huge pages were seen to be 2.5 times faster where the hypervisor still backed the memory, and 4 times slower where it
had taken it back, within one minute. So every block is timed, the size that was faster lately is taken for the next, and the
other is tried again now and then. Contents never change, so a kernel without the call loses nothing but the time.
"""

import collections
import ctypes
import mmap
import time
from collections.abc import Iterator

import torch

BLOCK_BYTES = 4 * 2**20
"""What is made present, and then filled, at a time: a whole number of huge pages that fits a core's share of the cache."""

TRIAL_EVERY = 64
"""One block of so many is populated the way that was slower lately. It costs some 2 to 5 % where it still is."""

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = 14, 15, 23


class Pages:
    """What has been made present during one load, and how fast that was. Threads may share it."""

    def __init__(self) -> None:
        self._madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
        self._present: set[int] = set()
        self._seconds = {
            advice: collections.deque(maxlen=2) for advice in (_MADV_NOHUGEPAGE, _MADV_HUGEPAGE)
        }  # of the last blocks
        self._trials = 0

    def parts(self, memory: torch.Tensor) -> Iterator[slice]:
        """A contiguous host tensor of bytes in parts of at most a block, each present when it is handed out."""
        start, position, nbytes = memory.data_ptr(), 0, memory.numel()
        low, high = _bounds(memory)
        while position < nbytes:
            block = (start + position) // BLOCK_BYTES
            end = min(nbytes, (block + 1) * BLOCK_BYTES - start)
            self._require(block, low, high)
            yield slice(position, end)
            position = end

    def make_present(self, memory: torch.Tensor) -> None:
        """Populate the blocks that a contiguous host tensor touches, as far as they lie in its storage."""
        start = memory.data_ptr()
        stop = start + memory.numel() * memory.element_size()
        low, high = _bounds(memory)
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            self._require(block, low, high)

    def _require(self, block: int, low: int, high: int) -> None:
        """The block of that number, as far as it lies between the addresses `low` and `high`; once."""
        if block not in self._present and self._madvise is not None:
            self._present.add(block)
            begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            self._populate(max(low, begin), min(high, end), whole=low <= begin and end <= high)

    def _populate(self, begin: int, end: int, whole: bool) -> None:
        """Bring the range of addresses in; only a whole block may be of huge pages, and only its time counts."""
        advice = self._advice() if whole else _MADV_NOHUGEPAGE
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        started = time.perf_counter()
        self._advise(begin, end, advice)  # refused where the kernel has no huge pages, which changes nothing
        if self._advise(begin, end, _MADV_POPULATE_WRITE):
            self._madvise = None
        elif whole:
            self._seconds[advice].append(time.perf_counter() - started)

    def _advice(self) -> int:
        """The page size for the next block: one that was not tried yet, the faster one, or in its turn the slower one."""
        self._trials += 1
        # Of two blocks the quicker one counts: a single slow one says more about the machine's other work.
        faster, slower = sorted(self._seconds, key=lambda advice: min(self._seconds[advice], default=0.0))
        return slower if self._trials % TRIAL_EVERY == 0 else faster

    def _advise(self, begin: int, end: int, advice: int) -> int:
        madvise = self._madvise
        return madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) if madvise else -1


def _bounds(memory: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor's storage, and the one behind its last."""
    storage = memory.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
