"""Reads to a device: through two page-locked buffers a thread, none of which is overwritten before its copy has ended."""

import pytest
import torch
from safetensors.torch import save_file

from tests import models
from tests.storage.late_device import late_device
from zero_sft.checkpoint.header import read_header
from zero_sft.plan.plan import ReadItem
from zero_sft.storage import reader


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"whole": torch.randn(5000), "apart": torch.randn(700)}
    save_file(tensors, tmp_path / "x.safetensors")
    return str(tmp_path / "x.safetensors"), tensors


def reads(path):
    """All of one tensor, and two columns of the other as a 100 x 7 matrix, transposed."""
    header = read_header(path)
    whole, apart = header["whole"], header["apart"]
    return [
        ReadItem(file=path, offset_bytes=whole.offset_bytes, nbytes=whole.nbytes, dtype="F32", target="whole", target_start=0,
             sizes=(5000,), source_strides=(1,), target_strides=(1,)),
        *(ReadItem(file=path, offset_bytes=apart.offset_bytes + (70 * i + 2) * 4, nbytes=(9 * 7 + 2) * 4, dtype="F32",
               target="apart", target_start=10 * i, sizes=(10, 2), source_strides=(7, 1), target_strides=(1, 100))
          for i in range(10)),
    ]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_arrives(file, monkeypatch, threads, dtype):
    monkeypatch.setattr(reader, "STAGING_BYTES", 1024)
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 4096)
    path, tensors = file
    memory, pinned = {"whole": torch.zeros(5000, dtype=dtype), "apart": torch.zeros(200, dtype=dtype)}, []
    with late_device(pinned):
        reader.fill(reads(path), memory, threads)
    assert torch.equal(memory["whole"], tensors["whole"].to(dtype))
    assert torch.equal(memory["apart"], tensors["apart"].view(100, 7)[:, 2:4].T.reshape(-1).to(dtype))
    assert 2 <= len(pinned) <= 2 * threads
    assert {buffer.numel() for buffer in pinned} == {1024}


def test_the_check_would_notice_a_buffer_that_is_used_too_early(file, monkeypatch):
    monkeypatch.setattr(reader, "STAGING_BYTES", 1024)
    path, tensors = file
    memory = {"whole": torch.zeros(5000), "apart": torch.zeros(200)}
    with late_device([]), monkeypatch.context() as patch:
        patch.setattr(reader._Worker, "_buffer", _never_waits)
        reader.fill(reads(path), memory)
    assert not torch.equal(memory["whole"], tensors["whole"])


def _never_waits(worker, place):
    worker._queue = worker._queue or reader.CopyQueue(place.device)
    while len(worker._staging) <= worker._turn:
        worker._staging.append(torch.empty(reader.STAGING_BYTES, dtype=torch.uint8))
    return worker._staging[worker._turn]


@pytest.fixture
def mixtral(tmp_path):
    return models.save_tiny("mixtral", tmp_path / "mixtral")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_whole_load(mixtral, dtype):
    from zero_sft import load_model

    reference, pinned = models.plain(mixtral, dtype), []
    with late_device(pinned):
        model = load_model(str(mixtral), ds_config=models.zero3(dtype == torch.bfloat16), buffer_mib=16)
    models.assert_equal(model, reference)
    assert sum(buffer.numel() for buffer in pinned) <= 16 * 2**20
