"""Loads onto real devices: contents, where shards live, host memory, pinned offload, and an engine's step. `make test-gpu`."""

import pytest
import torch

from tests import models

pytestmark = pytest.mark.gpu


def has_devices(count):
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return accelerator.device_name() != "cpu" and accelerator.device_count() >= count


@pytest.fixture(autouse=True)
def enough_devices(request):
    size = request.node.callspec.params.get("_world_size", 1) if hasattr(request.node, "callspec") else 1
    if not has_devices(size):
        pytest.skip(f"needs {size} device{'s' * (size > 1)}")


@pytest.fixture
def checkpoint(tmp_path, architecture):
    return models.save_tiny(architecture, tmp_path / architecture)


@pytest.fixture
def wide(tmp_path):
    """400 MB, of tensors beyond the staging buffers."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 16}
    return models.save_tiny("llama", tmp_path / "wide", num_key_value_heads=16, **sizes)


def on_device(model):
    from deepspeed.accelerator import get_accelerator

    wanted = get_accelerator().current_device_name()
    return all(str(param.ds_tensor.device) == wanted for param in model.parameters())


@pytest.mark.world_size(1, 2, 4, 8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_shards_are_on_the_device_and_equal_plain_loading(checkpoint, dtype):
    from zero_sft import load_model

    reference = models.plain(checkpoint, getattr(torch, dtype))
    model = load_model(str(checkpoint), ds_config=models.zero3(dtype == "bfloat16"))
    assert on_device(model)
    models.assert_equal(model, reference)


@pytest.mark.world_size(1, 2, 8)
@pytest.mark.parametrize("threads", [1, 4])
def test_large_tensors_pass_through_the_ring(wide, threads):
    from zero_sft import load_model
    from zero_sft.sharded import BUFFER_MIB_A_THREAD

    reference = models.plain(wide, torch.float32)
    load_model(str(wide), ds_config=models.zero3(False))  # the device's own start
    model = load_model(str(wide), ds_config=models.zero3(False), buffer_mib=threads * BUFFER_MIB_A_THREAD)
    models.assert_equal(model, reference)
    assert model.load_report.peak_host_bytes < (threads * BUFFER_MIB_A_THREAD + 64) * 2**20


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("architecture", ["llama"])
def test_offloaded_shards_are_pinned(checkpoint):
    from zero_sft import load_model

    reference = models.plain(checkpoint, torch.bfloat16)
    offload = {"offload_param": {"device": "cpu", "pin_memory": True}}
    model = load_model(str(checkpoint), ds_config=models.zero3(zero_optimization=offload))
    assert all(param.ds_tensor.is_pinned() for param in model.parameters())
    models.assert_equal(model, reference)


@pytest.mark.world_size(1, 2, 8)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_engine_trains_what_was_loaded(checkpoint):
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from zero_sft import load_model

    ds = models.zero3(train_micro_batch_size_per_gpu=1, optimizer={"type": "AdamW", "params": {"lr": 1e-3}})
    losses = {}
    for loader in ("sharded", "stock"):
        torch.manual_seed(0)
        model = load_model(str(checkpoint), ds_config=ds, loader=loader)
        engine, *_ = deepspeed.initialize(model=model, config=ds)
        ids = torch.arange(3, 19, device=get_accelerator().current_device_name()).view(1, 16)
        losses[loader] = []
        for _ in range(3):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses[loader].append(float(loss))
    assert losses["sharded"] == losses["stock"]
    assert losses["sharded"][-1] < losses["sharded"][0]
