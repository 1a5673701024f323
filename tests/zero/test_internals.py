"""A release that moved something says so by name; an untested one warns. And the facts that the code rests on."""

import pytest
import torch

from tests import models
from tests.errors import raises


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


@pytest.mark.parametrize("name", ["_post_init_method", "_convert_to_deepspeed_param"])
def test_a_moved_deepspeed_internal_is_named(monkeypatch, name):
    from deepspeed.runtime.zero.partition_parameters import Init

    from zero_sft.zero import internals

    internals.check()
    monkeypatch.setattr(Init, name, lambda self, other, arguments: None)
    with raises("version.deepspeed_moved", f"zero.Init.{name}", "--loader stock"):
        internals.check()


def test_moved_engine_hooks_are_named(monkeypatch):
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    from zero_sft.zero import internals

    monkeypatch.delattr(DeepSpeedZeRoOffload, "setup_zero_stage3_hooks")
    with raises("version.deepspeed_moved", "setup_zero_stage3_hooks"):
        internals.check()


def test_a_moved_transformers_internal_is_named(monkeypatch):
    from transformers import core_model_loading

    from zero_sft import transformers_internals

    transformers_internals.check()
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    with raises("version.transformers_moved", "core_model_loading", "rename_source_key", "--loader stock"):
        transformers_internals.check()


def test_untested_releases_warn(monkeypatch):
    from zero_sft import transformers_internals
    from zero_sft.zero import internals

    assert internals.untested() is None
    assert transformers_internals.untested() is None
    monkeypatch.setattr(internals.deepspeed, "__version__", "0.99.0+abc")
    # By way of its user: transformers' lazy module may be made a second time while its parts are imported.
    monkeypatch.setattr(transformers_internals.transformers, "__version__", "9.0.0")
    assert "0.99.0 is untested here; tested: 0.19.8" in internals.untested()
    assert "9.0.0 is untested here; tested: 5.23.0" in transformers_internals.untested()


@pytest.mark.world_size(2)
def test_a_moved_internal_leaves_the_stock_loader(llama):
    """The sharded loader refuses on every rank; `loader="stock"` still loads the same weights."""
    from unittest import mock

    from zero_sft import load_model
    from zero_sft.zero import internals

    reference = models.plain(llama, torch.bfloat16)
    with mock.patch.dict(internals._INIT_METHODS, {"_post_init_method": ["self", "moved"]}):
        with raises("version.deepspeed_moved", "_post_init_method"):
            load_model(str(llama), ds_config=models.zero3())
        model = load_model(str(llama), ds_config=models.zero3(), loader="stock")
    assert model.load_report.loader == "stock"
    models.assert_equal(model, reference)


@pytest.mark.world_size(3)
def test_ranges_are_deepspeeds_own(llama):
    """Our arithmetic against what `zero.Init` itself keeps of every parameter."""
    from zero_sft import load_model
    from zero_sft.zero import shards

    stock = dict(load_model(str(llama), ds_config=models.zero3(), loader="stock").named_parameters())
    ours = dict(load_model(str(llama), ds_config=models.zero3()).named_parameters())
    assert stock.keys() == ours.keys()
    for name, param in ours.items():
        assert param.ds_tensor.shape == stock[name].ds_tensor.shape, name
        assert param.ds_numel_aligned == stock[name].ds_numel_aligned, name
        assert torch.equal(shards.local_shard(param), shards.local_shard(stock[name])), name
        assert not param.ds_tensor[shards.local_range(param).numel :].any(), name


@pytest.mark.world_size(2)
def test_a_parameter_added_later_becomes_a_zero_parameter(llama):
    """An adapter that is attached after the load takes DeepSpeed's own way into the engine."""
    import deepspeed

    from zero_sft import load_model

    ds = models.zero3(train_micro_batch_size_per_gpu=1, optimizer={"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}})
    model = load_model(str(llama), ds_config=ds)
    torch.manual_seed(torch.distributed.get_rank())
    model.extra = torch.nn.Linear(7, 5).to(torch.bfloat16)
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())
    assert all(hasattr(param, "ds_id") for param in engine.module.parameters())
    ids = torch.arange(6).view(1, 6) + 3
    assert torch.isfinite(engine(input_ids=ids, labels=ids).loss)
