"""A caller sees a sharded model as it sees an unsharded one, or is told what to do."""

import copy

import pytest
import torch

from tests import models
from tests.errors import raises
from tests.slow import slow

IDS = torch.arange(3, 15).view(1, -1)


@pytest.fixture
def folder(architecture, tmp_path):
    return models.save_tiny(architecture, tmp_path / "model", torch.float32)


def loaded(folder, **options):
    from zero_sft import load_model

    ds = models.zero3(bf16=False, train_micro_batch_size_per_gpu=1, optimizer={"type": "Adam", "params": {"torch_adam": True}})
    return load_model(str(folder), ds_config=ds, dtype=torch.float32, **options), ds


def started(model, ds):
    import deepspeed

    return deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())[0]


def full(model):
    """All parameters and buffers in full, by name."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    from zero_sft.zero import shards

    return {name: models.gather_full(each) if shards.is_sharded(each) else each for name, each in tensors.items()}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["llama", slow("qwen2"), slow("mixtral")])
def test_counts(folder):
    """Before and after the engine's start."""
    import zero_sft

    plain = models.plain(folder, torch.float32)
    model, ds = loaded(folder)
    engine = None
    for _ in ("before", "after"):
        assert model.num_parameters() == plain.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
        assert model.get_memory_footprint() == plain.get_memory_footprint()
        assert model.get_memory_footprint(return_buffers=False) == plain.get_memory_footprint(return_buffers=False)
        assert repr(model) == repr(plain)
        shapes = {name: zero_sft.full_shape(param) for name, param in model.named_parameters()}
        assert shapes == {name: tuple(param.shape) for name, param in plain.named_parameters()}
        model.lm_head.requires_grad_(False)
        plain.lm_head.requires_grad_(False)
        assert model.num_parameters(only_trainable=True) == plain.num_parameters(only_trainable=True)
        model.lm_head.requires_grad_(True)
        plain.lm_head.requires_grad_(True)
        engine = engine or started(model, ds)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["llama"])
def test_state_dict(folder, tmp_path):
    """Never silently empty; right inside GatheredParameters; DeepSpeed's own checkpoints go on."""
    import deepspeed

    plain = models.plain(folder, torch.float32)
    model, ds = loaded(folder)
    with raises("model.state_dict_of_shards", "zero_sft.save_pretrained"):
        model.state_dict()
    assert model.state_dict(keep_vars=True).keys() == plain.state_dict().keys()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    engine = started(model, ds)
    with raises("model.state_dict_of_shards", "zero_sft.save_pretrained"):
        engine.module.state_dict()
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    engine.load_checkpoint(str(tmp_path / "checkpoint"))
    with raises("model.engine_has_started", "load_checkpoint"):
        model.load_state_dict(state)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("architecture", ["llama", slow("qwen2")])
def test_load_state_dict(folder):
    plain = models.plain(folder, torch.float32)
    model, ds = loaded(folder)
    with torch.no_grad():
        for number, param in enumerate(plain.parameters()):
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(number)))
    result = model.load_state_dict(plain.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    models.assert_equal(model, plain)
    state = dict(plain.state_dict())
    norm = state.pop("model.norm.weight")
    with raises("model.other_state_dict", "missing: model.norm.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(state | {"other": norm}, strict=False) == (["model.norm.weight"], ["other"])
    with raises("model.other_state_dict", "of another shape: model.norm.weight"):
        model.load_state_dict(state | {"model.norm.weight": norm[:-1]}, strict=False)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        torch.testing.assert_close(started(model, ds)(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["qwen2", slow("llama")])
@pytest.mark.parametrize(("rows", "options"), [
    (150, {}), (150, {"pad_to_multiple_of": 32}), (150, {"mean_resizing": False}), (100, {}),
], ids=["mean", "padded", "normal", "fewer"])  # fmt: skip
def test_resize_token_embeddings(folder, tmp_path, rows, options):
    """The rows that plain transformers makes, tied and untied; they train, and are exported."""
    from zero_sft import save_pretrained
    from zero_sft.transformers_internals import zero3_under
    from zero_sft.zero import shards

    plain = models.plain(folder, torch.float32)
    with zero3_under(None):
        torch.manual_seed(8)
        plain.resize_token_embeddings(rows, **options)
    model, ds = loaded(folder)
    torch.manual_seed(8 if torch.distributed.get_rank() == 0 else 9)
    assert model.resize_token_embeddings(rows, **options) is model.get_input_embeddings()
    assert model.config.vocab_size == plain.config.vocab_size
    assert all(shards.is_sharded(param) for param in model.parameters())
    models.assert_equal(model, plain.eval())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    engine = started(model, ds)
    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
    engine.step()
    save_pretrained(engine, tmp_path / "out")
    torch.distributed.barrier()
    trained = full(model)
    with zero3_under(None):
        reopened = models.plain(tmp_path / "out", torch.float32)
    assert reopened.config.vocab_size == plain.config.vocab_size
    for name, param in reopened.named_parameters():
        assert torch.equal(param, trained[name]), name
    with raises("model.engine_has_started", "before deepspeed.initialize"):
        model.resize_token_embeddings(rows + 1)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("architecture", ["llama"])
def test_a_deleted_model_is_freed_at_once(folder):
    """Its methods make no cycle of references."""
    import gc
    import weakref

    model, _ = loaded(folder)
    reference = weakref.ref(model)
    gc.disable()
    del model
    assert reference() is None


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["llama"])
def test_refused_with_what_to_do(folder):
    model, ds = loaded(folder)
    with raises("model.deepcopy", "call load_model again"):
        copy.deepcopy(model)
    with raises("model.moved", "from cpu to meta"):
        model.to("meta")
    assert model.to(torch.float32) is model.float() is model.cpu() is model
    copied = copy.deepcopy(model.config)
    assert copied.vocab_size == model.config.vocab_size
    started(model, ds)
    with raises("model.deepcopy", "call load_model again"):
        copy.deepcopy(model)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["mixtral"])
def test_save_pretrained(folder, tmp_path):
    """The method of the model writes what plain transformers writes, in files of the size that is asked for."""
    from zero_sft.transformers_internals import zero3_under

    plain = models.plain(folder, torch.float32)
    model, _ = loaded(folder)
    model.save_pretrained(tmp_path / "out", max_shard_size="60KB", safe_serialization=None)
    torch.distributed.barrier()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    with zero3_under(None):
        reopened = models.plain(tmp_path / "out", torch.float32)
    for name, param in reopened.named_parameters():
        assert torch.equal(param, plain.get_parameter(name)), name
    with raises("model.save_option", "variant"):
        model.save_pretrained(tmp_path / "other", variant="fp16")
    with raises("arguments.wrong_value", "max_shard_size"):
        model.save_pretrained(tmp_path / "other", max_shard_size="many")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize("backend", [slow("eager"), slow("inductor")])
def test_compiled(folder, backend):
    """By torch before the engine's start, and by the engine's own method afterwards."""
    import deepspeed

    from zero_sft import load_model

    plain = models.plain(folder, torch.float32)
    ds = models.zero3(
        bf16=False, train_micro_batch_size_per_gpu=1, optimizer={"type": "SGD", "params": {"lr": 0.01}}, gradient_clipping=0.0,
        zero_allow_untested_optimizer=True, zero_optimization={"stage3_param_persistence_threshold": 0},
    )  # fmt: skip
    model = load_model(str(folder), ds_config=ds, dtype=torch.float32)
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(input_ids=IDS).logits
        tolerance = 1e-4 if backend == "inductor" else 1e-5  # inductor's kernels round otherwise
        torch.testing.assert_close(found, plain(input_ids=IDS).logits, rtol=tolerance, atol=tolerance)
    engine = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())[0]
    engine.compile(backend=backend)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _ in range(2):
        found, expected = (each(input_ids=IDS, labels=IDS).loss for each in (engine, plain))
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        engine.backward(found)
        engine.step()
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.world_size(1)
@pytest.mark.parametrize("architecture", ["llama"])
def test_calls_that_can_not_be_answered(folder):
    model, _ = loaded(folder)
    for rows in (0, -5, 300.5, True):
        with raises("model.bad_size", repr(rows)):
            model.resize_token_embeddings(rows)
    with raises("model.gone", "in a variable"):
        loaded(folder)[0].resize_token_embeddings(300)
    copied = copy.deepcopy(model.model.norm)
    del model
    assert "RMSNorm" in repr(copied)
