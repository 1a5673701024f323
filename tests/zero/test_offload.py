"""Shards that live elsewhere: host memory, NVMe, a copy inside the node (hpZ). Loaded right, and trained as stock-loaded."""

import pytest
import torch

from tests import models


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


def train(folder, ds, loader, steps=3):
    """Losses of a few steps from this loader's weights."""
    import deepspeed

    from zero_sft import load_model

    model = load_model(str(folder), ds_config=ds, loader=loader)
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())
    ids = torch.arange(12).view(1, 12) + 3 + torch.distributed.get_rank()
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}


def ds_config(**zero_optimization):
    return models.zero3(
        train_micro_batch_size_per_gpu=1, optimizer=ADAM, zero_force_ds_cpu_optimizer=False, zero_optimization=zero_optimization
    )


@pytest.mark.world_size(2)
def test_cpu(llama):
    from zero_sft import load_model

    ds = ds_config(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    reference = models.plain(llama, torch.bfloat16)
    model = load_model(str(llama), ds_config=ds)
    models.assert_equal(model, reference)
    del model
    assert train(llama, ds, "sharded") == train(llama, ds, "stock")


@pytest.mark.world_size(2, 4, slow=(4,))
def test_hpz(llama):
    """The copy inside the node is made at the first release; both groups of ranks see the same weights."""
    size = max(2, torch.distributed.get_world_size() // 2)
    ds = ds_config(zero_hpz_partition_size=size)
    stock = train(llama, ds, "stock")
    assert train(llama, ds, "sharded") == stock
    assert stock[-1] < stock[0]


@pytest.mark.world_size(2)
def test_hpz_before_the_engine(llama):
    from zero_sft import load_model

    reference = models.plain(llama, torch.float32)
    ids = torch.arange(10).view(2, 5) + 3
    with torch.no_grad():
        want = reference(ids).logits
        model = load_model(str(llama), ds_config=models.zero3(False, zero_optimization={"zero_hpz_partition_size": 2}))
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=500)
def test_nvme(llama, tmp_path):
    models.require_async_io()
    from zero_sft import load_model
    from zero_sft.cluster.world import World

    folder = tmp_path / f"nvme{World.detect().rank}"
    folder.mkdir()
    ds = ds_config(
        offload_param={"device": "nvme", "nvme_path": str(folder), "buffer_size": 1_000_000, "buffer_count": 4},
    )
    reference = models.plain(llama, torch.bfloat16)
    model = load_model(str(llama), ds_config=ds)
    models.assert_equal(model, reference)
