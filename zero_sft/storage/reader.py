"""Carry out a plan's reads: positioned reads from the files into the destination tensors.

A read goes straight into the destination if that is host memory, has the stored dtype and keeps the elements contiguous: the
kernel copies the bytes and nothing else touches them. Any other read goes through a staging buffer of bounded size, from which
it is cast, scattered or copied to the device. On an accelerator the buffers are pinned, and each thread alternates between two,
so that the copy from one overlaps the read into the other.
Reads happen in file order, in several threads if the rank has spare cores.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from zero_sft.checkpoint.file_identity import FileIdentity, explain_read_errors, require_unchanged
from zero_sft.checkpoint.scaled import ScaleRows
from zero_sft.errors import CheckpointError
from zero_sft.plan.plan import SCATTER_BYTES, ReadItem
from zero_sft.storage.accelerator import CopyQueue, is_on_device, pinned_zeros
from zero_sft.storage.dtypes import TORCH_DTYPES, bytes_view
from zero_sft.storage.pages import Pages

Dequantize = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
"""(rows, cols) of quantised numbers, a grid of scales with one element per block, a dtype → (rows, cols) of that dtype."""

STAGING_BYTES = SCATTER_BYTES
"""Bytes of a staging buffer, which holds any scattered read of a plan. A thread that stages reads has one or two buffers."""

_CHUNK_BYTES = 32 * 2**20  # bytes per read: large enough to stream, small enough for threads to share a large tensor


def fill(
    reads: Sequence[ReadItem],
    destinations: Mapping[str, torch.Tensor],
    threads: int = 1,
    identities: Mapping[str, FileIdentity] | None = None,
    dequantize: Dequantize | None = None,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Read all `reads` into `destinations` (flat tensors by target name). Returns the number of bytes read.

    Any rank; does not communicate.

    Args:
        identities: the files' identities, by path, when the reads were planned.
        dequantize: the arithmetic for reads with scales.
        advance: called with the number of bytes after each read of at most 32 MiB, from several threads.

    Raises:
        CheckpointError: a file can't be opened or read, ends early, or has changed since the reads were planned.
    """
    identities = identities or {}
    with contextlib.ExitStack() as stack:
        paths = dict.fromkeys(part.file for read in reads for part in (read, read.scales) if part is not None)
        handles = {path: stack.enter_context(opened(path, identities.get(path))) for path in paths}
        shared = _SharedState(handles=handles, destinations=destinations, dequantize=dequantize, advance=advance)
        queue = iter([piece for read in reads for piece in _pieces(read)])
        if threads <= 1:
            _work(shared, queue)
        else:  # next() on an iterator is atomic under the GIL, so the threads share it in file order
            with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
                for future in [pool.submit(_work, shared, queue) for _ in range(threads)]:
                    future.result()
    return sum(read.total_nbytes for read in reads)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _SharedState:
    """The state that all threads of one `fill` share."""

    handles: Mapping[str, int]
    destinations: Mapping[str, torch.Tensor]
    dequantize: Dequantize | None
    advance: Callable[[int], None] | None = None
    pages: Pages = dataclasses.field(default_factory=Pages)


def _work(state: _SharedState, queue: Iterator[ReadItem]) -> None:
    """Do one thread's work: take reads from the queue until it is empty. An error empties it for all threads."""
    worker = _Worker(state)
    try:
        for piece in queue:
            worker.run(piece)
            if state.advance is not None:
                state.advance(piece.total_nbytes)
        worker.finish()
    except BaseException:
        collections.deque(queue, maxlen=0)  # the other threads end after their present read, and the rank reports at once
        raise


@contextlib.contextmanager
def opened(path: str, expected: FileIdentity | None) -> Generator[int]:
    """Open a file for reading, and check before and after the body that it is the `expected` one. Yields the descriptor.

    Raises:
        CheckpointError: the file can't be opened, or has changed.
    """
    with explain_read_errors(path):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        require_unchanged(path, handle, expected)
        if hasattr(os, "posix_fadvise"):  # longer read-ahead: a fifth faster on a local disk with a cold cache
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield handle
        require_unchanged(path, handle, expected)
    finally:
        os.close(handle)


def _pieces(read: ReadItem) -> Iterator[ReadItem]:
    """Split a contiguous read into parts of at most `_CHUNK_BYTES` bytes. Scattered and scaled reads are already small."""
    if read.nbytes <= _CHUNK_BYTES or not read.is_contiguous or read.scales is not None:
        yield read
        return
    itemsize = TORCH_DTYPES[read.dtype].itemsize
    for skip in range(0, read.nbytes, _CHUNK_BYTES):
        nbytes = min(_CHUNK_BYTES, read.nbytes - skip)
        start, sizes = read.target_start + skip // itemsize, (nbytes // itemsize,)
        yield dataclasses.replace(read, offset_bytes=read.offset_bytes + skip, nbytes=nbytes, target_start=start, sizes=sizes)


class _Worker:
    """One reading thread and its staging buffers, which are allocated on first use."""

    def __init__(self, state: _SharedState) -> None:
        self._state = state
        self._staging: list[torch.Tensor] = []
        self._queue: CopyQueue | None = None
        self._copied: list[Any] = [None, None]  # for each buffer, the event after which it may be overwritten
        self._turn = 0

    def run(self, read: ReadItem) -> None:
        """Carry out one read: in place, or through a buffer if it is cast, scattered or copied to a device."""
        dtype, destination = TORCH_DTYPES[read.dtype], self._state.destinations[read.target]
        place = destination.as_strided(read.sizes, read.target_strides, destination.storage_offset() + read.target_start)
        if read.scales is not None:
            place.copy_(self._read_scaled(read, read.scales, dtype, destination.dtype))
        elif not read.is_contiguous:
            self._read_staged(read, place, dtype, 0, read.nbytes)
        elif not is_on_device(place) and place.dtype == dtype:
            view = bytes_view(place)
            for part in self._state.pages.parts(place.view(torch.uint8)):
                self._read_at(read.file, view[part], read.offset_bytes + part.start, read.target)
        else:
            step = STAGING_BYTES // dtype.itemsize
            for start in range(0, place.numel(), step):
                part = place.narrow(0, start, min(step, place.numel() - start))
                if not is_on_device(part):
                    self._state.pages.make_present(part)
                self._read_staged(read, part, dtype, start * dtype.itemsize, part.numel() * dtype.itemsize)

    def finish(self) -> None:
        """Wait for the copies to the device that have not completed."""
        for event in self._copied:
            if event is not None:
                event.synchronize()

    def _read_scaled(self, read: ReadItem, scales: ScaleRows, stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
        """Read a range of a quantised weight and its scales, and dequantise it row of blocks by row of blocks.

        The range is placed in complete rows; elements outside of it are zero.
        """
        rows = -(-(scales.skip + read.nbytes) // scales.width)
        padded = -(-scales.width // scales.block_cols) * scales.block_cols
        flat = torch.zeros(rows * scales.width, dtype=torch.uint8)
        self._read_at(read.file, bytes_view(flat.narrow(0, scales.skip, read.nbytes)), read.offset_bytes, read.target)
        weight = torch.zeros(rows, padded, dtype=torch.uint8)
        weight[:, : scales.width] = flat.view(rows, scales.width)
        weight = weight.view(stored)
        grid = torch.empty(scales.nbytes, dtype=torch.uint8)
        self._read_at(scales.file, bytes_view(grid), scales.offset_bytes, read.target)
        grid = grid.view(TORCH_DTYPES[scales.dtype]).view(-1, scales.columns)
        assert self._state.dequantize is not None, "reads with scales need `dequantize`"
        result = torch.empty(rows, scales.width, dtype=dtype)
        row = 0
        for block_row in range(len(grid)):
            end = min(rows, (block_row + 1) * scales.block_rows - scales.first_row)
            part = self._state.dequantize(weight[row:end], grid[block_row : block_row + 1], dtype)
            result[row:end] = part[:, : scales.width]
            row = end
        return result.view(-1).as_strided(read.sizes, read.source_strides, scales.skip)

    def _read_staged(self, read: ReadItem, place: torch.Tensor, stored: torch.dtype, skip_bytes: int, nbytes: int) -> None:
        """Read into the current buffer, copy its elements to their place, then switch to the other buffer.

        A copy to a device is asynchronous: the buffer is overwritten only after the event that the copy returns.
        """
        buffer = self._buffer(place)[:nbytes]
        self._read_at(read.file, bytes_view(buffer), read.offset_bytes + skip_bytes, read.target)
        elements = buffer.view(stored)
        if self._queue is not None and is_on_device(place):
            self._copied[self._turn] = self._queue.copy(place, elements, read.source_strides)
        else:
            place.copy_(elements.as_strided(place.shape, read.source_strides))
        self._turn = 1 - self._turn

    def _buffer(self, place: torch.Tensor) -> torch.Tensor:
        """Return the current buffer once it may be overwritten. It is page-locked if `place` is on a device."""
        for_device = is_on_device(place)
        if for_device and self._queue is None:
            self._queue = CopyQueue(place.device)  # before this thread's first other call to the device
        while len(self._staging) <= self._turn:
            empty = pinned_zeros if for_device else torch.empty
            self._staging.append(empty(STAGING_BYTES, dtype=torch.uint8))
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        return self._staging[self._turn]

    def _read_at(self, file: str, view: memoryview, offset_bytes: int, target: str) -> None:
        position = 0
        while position < len(view):
            offset = offset_bytes + position
            try:
                count = os.preadv(self._state.handles[file], [view[position:]], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{file} can't be read at byte {offset} (for {target}): {error.strerror}. Check its disk or network.",
                    code="checkpoint.read_failed",
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{file} ends at byte {offset}, expected {len(view) - position} more bytes for {target}: it was "
                    "truncated after its header was read. Download it again.",
                    code="checkpoint.truncated_while_read",
                )
            position += count
