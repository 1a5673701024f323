"""Blocks that are present, contents that stay, and the page size that was faster lately."""

import ctypes
import mmap

import pytest
import torch

from zero_sft.storage import pages
from zero_sft.storage.arena import ArenaSlot, allocate
from zero_sft.storage.pages import BLOCK_BYTES, Pages


def arena(nbytes):
    return allocate([ArenaSlot(name="a", numel=nbytes, dtype=torch.uint8, device=torch.device("cpu"))])["a"]


def present_pages(memory):
    """How many pages of a mapping the kernel says are there."""
    flags = (ctypes.c_ubyte * -(-memory.numel() // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), flags) == 0
    return sum(flag & 1 for flag in flags)


def test_parts_cover_a_range_once_and_are_present():
    memory = arena(3 * BLOCK_BYTES + 12345)
    wanted = memory[777 : 2 * BLOCK_BYTES + 5]
    assert present_pages(memory) == 0
    parts = [wanted[part] for part in Pages().parts(wanted)]
    assert sum(part.numel() for part in parts) == wanted.numel()
    assert [part.data_ptr() for part in parts] == [
        wanted.data_ptr() + sum(p.numel() for p in parts[:i]) for i in range(len(parts))
    ]
    assert all(part.numel() <= BLOCK_BYTES for part in parts)
    assert present_pages(memory) * mmap.PAGESIZE >= wanted.numel()


def test_what_is_there_already_stays():
    memory = arena(BLOCK_BYTES)
    memory[100:200] = 7
    keeper = Pages()
    assert sum(int(memory[part].sum()) for part in keeper.parts(memory)) == 700
    for part in keeper.parts(memory):  # known to be present
        memory[part] = 1
    assert memory.sum() == BLOCK_BYTES


def test_memory_that_is_smaller_than_a_block_or_not_from_an_arena():
    memory = torch.zeros(5000, dtype=torch.uint8)
    assert [part.stop - part.start for part in Pages().parts(memory[1:4000])] in (
        [3999],
        *([n, 3999 - n] for n in range(1, 3999)),
    )
    assert not memory.any()
    assert list(Pages().parts(memory[:0])) == []


class FakeKernel:
    """Takes `seconds` for a block by its page size, on a clock of its own."""

    def __init__(self, seconds):
        self.seconds, self.now, self.advice, self.populated = seconds, 0.0, None, []

    def madvise(self, begin, length, advice):
        if advice != pages._MADV_POPULATE_WRITE:
            self.advice = advice
            return 0
        self.now += self.seconds[self.advice]
        self.populated.append(self.advice)
        return 0


@pytest.mark.parametrize("faster", [pages._MADV_HUGEPAGE, pages._MADV_NOHUGEPAGE])
def test_the_faster_page_size_is_taken_and_the_other_tried_again(monkeypatch, faster):
    slower = pages._MADV_HUGEPAGE + pages._MADV_NOHUGEPAGE - faster
    kernel = FakeKernel({faster: 1.0, slower: 4.0})
    monkeypatch.setattr(pages.time, "perf_counter", lambda: kernel.now)
    keeper = Pages()
    keeper._madvise = kernel.madvise
    memory = arena(263 * BLOCK_BYTES)  # untouched, so it costs nothing
    keeper.make_present(memory[BLOCK_BYTES : 102 * BLOCK_BYTES])
    assert 2 <= kernel.populated.count(slower) <= 3  # the first try, and one in 64
    kernel.seconds = {faster: 4.0, slower: 1.0}  # the hypervisor thinks otherwise now
    kernel.populated.clear()
    keeper.make_present(memory[102 * BLOCK_BYTES : 262 * BLOCK_BYTES])
    assert kernel.populated.count(slower) > 30


def test_a_kernel_without_the_call_is_asked_once():
    keeper, calls = Pages(), []
    keeper._madvise = lambda begin, length, advice: calls.append(advice) or -1
    memory = arena(4 * BLOCK_BYTES)
    for part in keeper.parts(memory):
        memory[part] = 3
    assert memory.min() == 3
    assert calls.count(pages._MADV_POPULATE_WRITE) == 1
