"""Loads onto devices: values of plain loading bit for bit, where shards live, and what the host holds meanwhile."""

import pytest
import torch

from tests import models
from tests.gpu.devices import Cases, device, on_cpu, plain

pytestmark = pytest.mark.gpu


@pytest.fixture
def checkpoints(tmp_path):
    return {name: models.save_tiny(name, tmp_path / name) for name in models.ARCHITECTURES}


@pytest.fixture
def wide(tmp_path):
    """400 MB, of tensors beyond the staging buffers."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 16}
    return models.save_tiny("llama", tmp_path / "wide", num_key_value_heads=16, **sizes)


@pytest.mark.world_size(1, 2, 4, 8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_are_on_the_device_and_equal_plain_loading(checkpoints, dtype):
    from zero_sft import load_model

    cases = Cases()
    references = {name: plain(folder, getattr(torch, dtype)) for name, folder in checkpoints.items()}
    for name, folder in checkpoints.items():
        with cases.case(name):
            model = load_model(str(folder), ds_config=models.zero3(dtype == "bfloat16"), verify=True)
            assert {param.ds_tensor.device for param in model.parameters()} == {device()}
            assert {buffer.device for buffer in model.buffers()} <= {device()}
            models.assert_equal(model, references[name])
            assert model.load_report.verified
    cases.require_all()


@pytest.mark.world_size(1, 2, 8)
def test_large_tensors_pass_through_the_ring(wide):
    """The bytes of a cast and of a plain copy, by one thread and by four; the host holds the ring alone."""
    from testing import probes
    from zero_sft import load_model
    from zero_sft.loading.options import READER_MIB

    cases, loaded = Cases(), {}
    for bf16 in (True, False):
        load_model(str(wide), ds_config=models.zero3(bf16))  # the device's start, which takes host memory
        for threads in (1, 4):
            with cases.case(f"{threads} threads, bf16 {bf16}"):
                buffer_mib = threads * READER_MIB
                with probes.PeakMemory() as peak:
                    loaded[bf16, threads] = load_model(str(wide), ds_config=models.zero3(bf16), buffer_mib=buffer_mib)
                assert on_cpu() or peak.growth < (buffer_mib + 64) * 2**20
    for (bf16, threads), model in loaded.items():
        with cases.case(f"values, {threads} threads, bf16 {bf16}"):
            expected = dict(plain(wide, torch.float32).named_parameters())
            for name, param in model.named_parameters():
                assert torch.equal(local(param).cpu(), cut(param, expected[name]).to(param.dtype)), name
    cases.require_all()


def local(param):
    from zero_sft.zero import shards

    return shards.local_shard(param)


def cut(param, whole):
    from zero_sft.zero import shards

    span = shards.local_range(param)
    return whole.detach().reshape(-1)[span.start : span.stop]


@pytest.mark.world_size(1, 2)
def test_offloaded_shards_are_pinned(checkpoints):
    from zero_sft import load_model

    cases = Cases()
    references = {name: plain(checkpoints[name], torch.bfloat16) for name in ("llama", "mixtral")}
    for name, reference in references.items():
        with cases.case(name):
            offload = {"offload_param": {"device": "cpu", "pin_memory": True}}
            model = load_model(str(checkpoints[name]), ds_config=models.zero3(zero_optimization=offload))
            assert on_cpu() or all(param.ds_tensor.is_pinned() for param in model.parameters() if not param.ds_persist)
            models.assert_equal(model, reference)
    cases.require_all()
