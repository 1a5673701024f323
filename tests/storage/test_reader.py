"""Reads into place, casts, pieces, threads, and files that fail under way."""

import contextlib
import os
import shutil
import time
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import raises
from zero_sft.checkpoint.file_identity import stat_identity
from zero_sft.checkpoint.header import read_header
from zero_sft.errors import CheckpointError
from zero_sft.plan.plan import ReadItem
from zero_sft.storage import reader
from zero_sft.storage.arena import ALIGNMENT_BYTES, ArenaSlot, allocate
from zero_sft.storage.writer import write_at


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(1000).to(torch.bfloat16), "b": torch.randn(777)}
    save_file(tensors, tmp_path / "x.safetensors")
    return str(tmp_path / "x.safetensors"), tensors


def read(header, name, start, stop, at=0):
    entry = header[name]
    offset = entry.offset_bytes + start * entry.itemsize
    nbytes = (stop - start) * entry.itemsize
    return ReadItem(
        file=entry.file, offset_bytes=offset, nbytes=nbytes, dtype=entry.dtype, target=name, target_start=at,
        sizes=(stop - start,), source_strides=(1,), target_strides=(1,),
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [4, 64, 2**25])
def test_in_place_and_cast(file, monkeypatch, threads, chunk):
    monkeypatch.setattr(reader, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(reader, "STAGING_BYTES", 32)
    path, tensors = file
    header = read_header(path)
    memory = {"a": torch.zeros(510, dtype=torch.bfloat16), "b": torch.zeros(300, dtype=torch.bfloat16)}
    done = reader.fill([read(header, "a", 17, 517, at=5), read(header, "b", 100, 400)], memory, threads)
    assert done == 500 * 2 + 300 * 4
    assert torch.equal(memory["a"][5:505], tensors["a"][17:517])
    assert not memory["a"][:5].any()
    assert not memory["a"][505:].any()
    assert torch.equal(memory["b"], tensors["b"][100:400].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_put_apart(file, dtype):
    """Columns 2 and 3 of a 10 × 7 matrix, transposed, with a cast and without, behind what is there already."""
    path, tensors = file
    entry = read_header(path)["b"]
    scattered = ReadItem(
        file=path, offset_bytes=entry.offset_bytes + 2 * 4, nbytes=(9 * 7 + 2) * 4, dtype="F32", target="b", target_start=3,
        sizes=(10, 2), source_strides=(7, 1), target_strides=(1, 10),
    )  # fmt: skip
    memory = torch.zeros(30, dtype=dtype)[:25]
    reader.fill([scattered], {"b": memory})
    expected = tensors["b"][:70].reshape(10, 7)[:, 2:4].T.reshape(-1).to(dtype)
    assert torch.equal(memory[3:23], expected)
    assert not memory[:3].any()
    assert not memory[23:].any()


def test_a_file_cut_after_its_header_was_read(file):
    path, _ = file
    header = read_header(path)
    os.truncate(path, header["a"].offset_bytes + 10)
    with raises("checkpoint.truncated_while_read", "x.safetensors"):
        reader.fill([read(header, "a", 0, 1000)], {"a": torch.zeros(1000, dtype=torch.bfloat16)})


@pytest.mark.parametrize("threads", [1, 3])
def test_no_thread_reads_on_when_one_has_failed(file, monkeypatch, threads):
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 4)
    done = []

    def run(worker, piece):
        if piece.target_start == 20:
            raise CheckpointError("x.safetensors can't be read", code="checkpoint.read_failed")
        time.sleep(0.01)
        done.append(piece)

    monkeypatch.setattr(reader._Worker, "run", run)
    header = read_header(file[0])
    with raises("checkpoint.read_failed"):
        reader.fill([read(header, "a", 0, 1000)], {"a": torch.zeros(1000, dtype=torch.bfloat16)}, threads)
    assert 10 <= len(done) <= 10 + threads, "of 500 pieces"


def test_a_file_that_went_away(file):
    path, _ = file
    header = read_header(path)
    os.unlink(path)
    with raises("checkpoint.file_unreadable"):
        reader.fill([read(header, "a", 0, 1000)], {"a": torch.zeros(1000, dtype=torch.bfloat16)})


@pytest.mark.parametrize("change", ["replaced", "written to", "written to while it is read"])
def test_a_file_that_is_another_than_when_its_header_was_read(file, change):
    path, _ = file
    header, identities = read_header(path), {path: stat_identity(path)}
    memory = {"a": torch.zeros(1000, dtype=torch.bfloat16)}
    assert reader.fill([read(header, "a", 0, 1000)], memory, identities=identities)

    def touch():
        os.utime(path, ns=(1, 1))

    if change == "replaced":
        shutil.copy2(path, f"{path}.new")
        os.replace(f"{path}.new", path)
    elif change == "written to":
        touch()
    with contextlib.ExitStack() as stack:
        if change == "written to while it is read":
            stack.enter_context(mock.patch.object(reader, "_pieces", lambda each: [touch() or each]))
        with raises("checkpoint.changed_while_read"):
            reader.fill([read(header, "a", 0, 1000)], memory, identities=identities)


def test_arena_cuts_are_zeroed_aligned_and_apart():
    slots = [
        ArenaSlot(name=str(i), numel=n, dtype=dtype, device=torch.device("cpu"))
        for i, (n, dtype) in enumerate([(5, torch.float32), (0, torch.float32), (1000, torch.bfloat16), (3, torch.float32)])
    ]
    memory = allocate(slots)
    for slot in slots:
        tensor = memory[slot.name]
        assert tensor.shape == (slot.numel,)
        assert tensor.dtype == slot.dtype
        assert tensor._base is None  # else it would keep the whole arena alive, wherever DeepSpeed moves its data
        assert not tensor.any()
        assert slot.numel == 0 or tensor.data_ptr() % ALIGNMENT_BYTES == 0
    memory["0"].fill_(1)
    assert not memory["3"].any()


def test_written_bytes_are_the_tensors(tmp_path):
    tensor = torch.randn(5000)
    path = tmp_path / "out"
    path.write_bytes(bytes(20100))
    handle = os.open(path, os.O_WRONLY)
    write_at(handle, path, tensor, 100)
    os.close(handle)
    assert path.read_bytes()[100:20100] == tensor.numpy().tobytes()
