"""Shards taken in place from the page cache: which can be, that they are the file's bytes, and that a write stays private."""

import dataclasses
import gc
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import raises
from tests.storage.test_reader import read
from zero_sft.checkpoint.header import read_header
from zero_sft.checkpoint.stamp import stamp
from zero_sft.storage import mapped
from zero_sft.storage.mapped import map_cached

BF16 = torch.bfloat16


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(300_000).to(BF16), "b": torch.randn(400_000).to(BF16), "c": torch.randn(200_000)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with path.open("rb") as opened:
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 0, getattr(os, "RWF_NOWAIT", 0))
        except OSError:
            pytest.skip("this file system can't tell what is cached")
    return str(path), tensors


def rss_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_the_files_bytes_wherever_they_begin(file):
    path, tensors = file
    header = read_header(path)
    reads = [read(header, "a", 1234, 201_234), read(header, "b", 77, 300_077), read(header, "c", 1, 100_001)]
    wanted = {"a": (200_000, BF16), "b": (300_000, BF16), "c": (100_000, torch.float32)}
    del map_cached(reads, wanted, {path: stamp(path)})["a"]  # what it imports is mapped, too
    before = rss_file_bytes()
    found = map_cached(reads, wanted, {path: stamp(path)})
    assert 0 <= rss_file_bytes() - before - 1_400_000 < 10 * resource.getpagesize()
    assert found.keys() == wanted.keys()
    for each, name in zip(reads, wanted, strict=True):
        start = (each.offset_bytes - header[name].offset_bytes) // header[name].itemsize
        assert torch.equal(found[name], tensors[name][start : start + wanted[name][0]])
        assert found[name]._base is None
        assert found[name].untyped_storage().nbytes() == each.nbytes


def test_a_write_stays_private_and_a_replaced_file_is_not_seen(file):
    path, tensors = file
    header = read_header(path)
    reads = [read(header, "a", 0, 300_000)]
    first, second = (map_cached(reads, {"a": (300_000, BF16)}, {})["a"] for _ in range(2))
    first.fill_(3.0)
    assert torch.equal(second, tensors["a"])
    save_file({"other": torch.zeros(10)}, f"{path}.new")
    os.replace(f"{path}.new", path)
    assert torch.equal(second, tensors["a"])
    assert bool((first == 3).all())


def test_mappings_go_with_their_shards_and_keep_no_file_open(file):
    path, _ = file
    header = read_header(path)
    handles = len(os.listdir("/proc/self/fd"))
    found = map_cached([read(header, "a", 0, 300_000)], {"a": (300_000, BF16)}, {})

    def mappings():
        return Path("/proc/self/maps").read_text().count(path)

    assert mappings() == 1
    assert len(os.listdir("/proc/self/fd")) == handles
    part = found["a"][10:20]
    del found
    gc.collect()
    assert mappings() == 1, "a view keeps it"
    assert part.shape == (10,)
    del part
    gc.collect()
    assert mappings() == 0


def test_where_the_kernel_refuses_it_is_read(file):
    path, _ = file
    header = read_header(path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
    try:
        found = map_cached([read(header, "a", 0, 300_000)], {"a": (300_000, BF16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert found == {}


def odd(header):
    return dataclasses.replace(read(header, "a", 0, 299_999), offset_bytes=header["a"].offset_bytes + 1)


REFUSED = {
    "cast": (lambda header: [read(header, "c", 0, 200_000)], (200_000, BF16)),
    "padded": (lambda header: [read(header, "a", 0, 300_000)], (300_001, BF16)),
    "two runs": (lambda header: [read(header, "a", 0, 150_000), read(header, "a", 150_000, 300_000, 150_000)], (300_000, BF16)),
    "between elements": (lambda header: [odd(header)], (299_999, BF16)),
    "small": (lambda header: [read(header, "a", 0, 1000)], (1000, BF16)),
    "put apart": (
        lambda header: [dataclasses.replace(read(header, "a", 0, 300_000), target_strides=(2,))],
        (300_000, BF16),
    ),
    "of nobody": (lambda header: [read(header, "b", 0, 300_000)], (300_000, BF16)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_shard_is_read(file, case):
    path, _ = file
    make, wanted = REFUSED[case]
    reads = make(read_header(path))
    name = "a" if case == "of nobody" else reads[0].target
    assert map_cached(reads, {name: wanted}, {}) == {}


def test_what_is_not_in_the_page_cache_is_read(file):
    path, _ = file
    header = read_header(path)
    reads, wanted = [read(header, "a", 0, 300_000)], {"a": (300_000, BF16)}
    assert map_cached(reads, wanted, {})
    with Path(path).open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(opened.fileno(), [bytearray(1)], reads[0].offset_bytes, os.RWF_NOWAIT)
        except BlockingIOError:
            assert map_cached(reads, wanted, {}) == {}
        else:
            pytest.skip("this file system keeps its files in memory")


def test_a_file_that_was_cut_is_left_to_the_reader(file):
    path, _ = file
    header = read_header(path)
    os.truncate(path, header["a"].offset_bytes + 1000)
    assert map_cached([read(header, "a", 0, 300_000)], {"a": (300_000, BF16)}, {}) == {}


def test_another_file_than_the_planned(file):
    path, _ = file
    header, stamps = read_header(path), {path: stamp(path)}
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)
    with raises("checkpoint.changed_while_read"):
        map_cached([read(header, "a", 0, 300_000)], {"a": (300_000, BF16)}, stamps)


def test_no_more_mappings_than_a_process_can_spare(file, monkeypatch):
    gc.collect()
    monkeypatch.setattr(mapped, "LIMIT", len(mapped._live) + 2)
    path, _ = file
    header = read_header(path)
    reads = [read(header, name, 0, 200_000) for name in "abc"]
    wanted = {"a": (200_000, BF16), "b": (200_000, BF16), "c": (200_000, torch.float32)}
    first = map_cached(reads, wanted, {})
    assert len(first) == 2
    del first["a"]
    assert len(map_cached(reads, wanted, {})) == 1  # what another load still has counts, too


def test_where_the_kernel_cannot_tell(file, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT")
    path, _ = file
    assert map_cached([read(read_header(path), "a", 0, 300_000)], {"a": (300_000, BF16)}, {}) == {}
