"""Compare loaded weights with plain `from_pretrained` on every architecture and world size, and use the model as usual."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.errors import raises
from zero_sft.errors import CheckpointError


def load(folder, bf16=True, **kwargs):
    from zero_sft import load_model

    kwargs.setdefault("ds_config", models.zero3(bf16))
    return load_model(str(folder), **kwargs)


def rewrite(folder: Path, change) -> Path:
    """Save the checkpoint again as one file, its tensors changed."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lacks_two_and_has_another(tensors):
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["something.else"] = torch.ones(3)


def ties_are_equal(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def lacks_the_source_of_a_tie(tensors):
    del tensors["model.embed_tokens.weight"]


def of_the_base_model(tensors):
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    tensors.clear()
    tensors.update(renamed)


def head_of_another_shape(tensors):
    tensors["lm_head.weight"] = torch.ones(130, 30)


def of_another_model(tensors):
    for name in list(tensors):
        tensors[f"encoder.{name}"] = tensors.pop(name)


def changed(*changes):
    """Run a test on checkpoints whose tensors were changed so."""
    return pytest.mark.parametrize("llama", changes, indirect=True, ids=[change.__name__ for change in changes])


@pytest.fixture
def llama(tmp_path, request):
    """A checkpoint in two files; with a parameter, its tensors changed by that function."""
    folder = models.save_tiny("llama", tmp_path / "llama")
    return rewrite(folder, request.param) if hasattr(request, "param") else folder


@pytest.fixture
def checkpoint(tmp_path, architecture):
    return models.save_tiny(architecture, tmp_path / architecture)


@pytest.mark.world_size(1, 2, 3, 8, slow=(2, 8))
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_bit_for_bit_in_the_checkpoints_dtype(checkpoint):
    reference = models.plain(checkpoint, torch.bfloat16)
    model = load(checkpoint)
    models.assert_equal(model, reference)
    report = model.load_report
    assert report.missing_keys == report.unexpected_keys == report.mismatched_keys == report.cast_keys == []
    assert report.loader == "sharded"


@pytest.mark.world_size(3)
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_bit_for_bit_cast_to_fp32(checkpoint):
    reference = models.plain(checkpoint, torch.float32)
    models.assert_equal(load(checkpoint, bf16=False), reference)


@pytest.mark.world_size(1, 3)
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_forward_and_generate_before_the_engine(checkpoint):
    reference = models.plain(checkpoint, torch.float32)
    ids = torch.arange(10).view(2, 5) + 3
    with torch.no_grad():
        want = reference(ids).logits
        model = load(checkpoint, bf16=False)
        got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    assert all(param.numel() == 0 for param in model.parameters() if param.ds_numel > 2), "partitioned again"


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.world_size(2)
def test_an_engine_takes_it_as_it_is(llama):
    """No hook is registered twice, and each training step equals that of the stock-loaded model."""
    import deepspeed

    reference = models.plain(llama, torch.float32)
    ids = torch.arange(12).view(2, 6) + 3
    want = reference(ids).logits.detach()
    ds = models.zero3(
        False, train_micro_batch_size_per_gpu=2, optimizer={"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
    )
    losses = {}
    for loader in ("stock", "sharded"):
        model = load(llama, ds_config=ds, loader=loader)
        engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())
        losses[loader, "hooks"] = hooks(engine.module)
        engine.eval()
        with torch.no_grad():
            torch.testing.assert_close(engine(ids).logits, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
            engine.module.generate(ids, max_new_tokens=2, do_sample=False, synced_gpus=True)
        engine.train()
        losses[loader] = []
        for _ in range(3):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses[loader].append(loss.item())
        engine.destroy()
    assert losses["sharded"] == losses["stock"]
    assert losses["sharded"][2] < losses["sharded"][0]
    assert losses["sharded", "hooks"] == losses["stock", "hooks"]


@pytest.mark.world_size(2)
def test_each_byte_is_read_once_and_no_weight_is_sent(llama):
    from zero_sft.checkpoint.index import read_index
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.cluster.world import World

    report = load(llama).load_report
    stored = read_index(llama).tensors.values()
    assert sum(all_gather_json(World.detect(), report.bytes_read)) == sum(tensor.nbytes for tensor in stored)
    assert report.bytes_communicated < 64 * 1024
    assert report.seconds > 0
    assert report.slowest_seconds >= report.seconds
    assert [each["bytes_read"] for each in report.ranks] == all_gather_json(World.detect(), report.bytes_read)
    assert report.slowest_seconds == max(each["seconds"] for each in report.ranks)
    assert report.peak_host_bytes >= report.bytes_read
    table = report.summary()
    assert "one rank: least" in table
    assert "all ranks" in table
    assert f"{sum(each['requests'] for each in report.ranks):,.0f}" in table
    assert json.loads(report.to_json())["ranks"] == report.ranks


@pytest.mark.world_size(1, 2, 3)
@changed(lacks_two_and_has_another)
def test_missing_weights_are_initialised_alike_everywhere(llama):
    """They get the values that plain loading draws with the same seed, on any world size, and the report names them."""
    torch.manual_seed(11)
    reference = models.plain(llama, torch.float32)
    torch.manual_seed(11)
    model = load(llama, bf16=False)
    models.assert_equal(model, reference)
    assert model.load_report.missing_keys == ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    assert model.load_report.unexpected_keys == ["something.else"]


@pytest.mark.world_size(2)
def test_no_ties_between_values_that_differ(llama):
    """The config ties two tensors, but the checkpoint holds different values for them: both are kept, as in plain loading."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    reference = models.plain(llama, torch.bfloat16, config=config)
    assert reference.lm_head.weight is not reference.model.embed_tokens.weight
    models.assert_equal(load(llama, config=config), reference)


@pytest.mark.world_size(2)
@changed(ties_are_equal)
def test_ties_between_equal_values(llama):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    reference = models.plain(llama, torch.bfloat16, config=config)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    models.assert_equal(load(llama, config=config), reference)


@pytest.mark.world_size(2)
@changed(lacks_the_source_of_a_tie)
def test_the_source_of_a_tie_is_missing(llama):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    reference = models.plain(llama, torch.bfloat16, config=config)
    model = load(llama, config=config)
    models.assert_equal(model, reference)
    assert model.load_report.missing_keys == []


@pytest.mark.world_size(2)
@changed(of_the_base_model)
def test_saved_from_the_base_model(llama):
    """The checkpoint's names lack the base model's prefix, and it has no head."""
    torch.manual_seed(3)
    reference = models.plain(llama, torch.bfloat16)
    torch.manual_seed(3)
    models.assert_equal(load(llama), reference)


def assert_one_error(folder, code, value):
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.cluster.world import World

    with raises(code, value) as caught:
        load(folder)
    assert len(set(all_gather_json(World.detect(), str(caught.value)))) == 1


@pytest.mark.world_size(3)
@changed(head_of_another_shape)
def test_a_tensor_of_another_shape(llama):
    assert_one_error(llama, "checkpoint.shapes_differ", "lm_head.weight: expected [131, 30], got [130, 30]")


@pytest.mark.world_size(3)
@changed(of_another_model)
def test_a_checkpoint_of_another_model(llama):
    assert_one_error(llama, "checkpoint.other_model", "encoder.")


@pytest.fixture
def damaged(llama, damage):
    paths = sorted(llama.glob("*.safetensors*"))
    if damage == "truncated":
        paths[0].write_bytes(paths[0].read_bytes()[:-5])
    elif damage == "no weights":
        for path in paths:
            path.unlink()
    return llama / "nothing" if damage == "no folder" else llama


@pytest.mark.world_size(3)
@pytest.mark.parametrize(
    ("damage", "code", "value"),
    [
        ("truncated", "checkpoint.truncated", ".safetensors"),
        ("no weights", "checkpoint.no_weights", "llama"),
        ("no folder", "hub.no_such_folder", "nothing"),
    ],
)
def test_bad_checkpoints_are_one_error_on_every_rank(damaged, damage, code, value):
    assert_one_error(damaged, code, value)


@pytest.mark.world_size(3)
def test_a_file_unreadable_on_one_rank_ends_all(llama):
    from unittest import mock

    from zero_sft.cluster.world import World
    from zero_sft.storage import reader

    def broken(*args, **kwargs):
        raise CheckpointError("model.safetensors can't be opened: Input/output error", code="checkpoint.file_unreadable")

    with raises("checkpoint.file_unreadable", "Input/output error", "rank 1 of 3"):
        if World.detect().rank == 1:
            with mock.patch.object(reader, "fill", broken):
                load(llama)
        else:
            load(llama)


@pytest.fixture
def other(tmp_path):
    return models.save_tiny("llama", tmp_path / "other", max_shard_size="1MB")


@pytest.mark.world_size(2)
def test_ranks_that_see_different_checkpoints(llama, other):
    from zero_sft.cluster.world import World

    with raises("cluster.ranks_disagree", "checkpoint"):
        load(other if World.detect().rank == 1 else llama)


@pytest.mark.world_size(1)
def test_code_of_the_model_needs_trust(llama):
    config = json.loads((llama / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"})
    (llama / "config.json").write_text(json.dumps(config))
    with raises("config.unknown_model_type", "trust_remote_code"):
        load(llama)


@pytest.mark.world_size(2)
def test_a_head_whose_class_is_a_mixin(llama):
    """`LlamaForSequenceClassification` inherits its `__init__` from a class that is not a module."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    reference = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16)
    torch.manual_seed(5)
    model = load(llama, model_class=AutoModelForSequenceClassification)
    models.assert_equal(model, reference)
    assert model.load_report.missing_keys == ["score.weight"]


@pytest.fixture
def xlnet(tmp_path):
    from transformers import XLNetConfig, XLNetLMHeadModel

    XLNetLMHeadModel(XLNetConfig(vocab_size=131, d_model=30, n_layer=2, n_head=3, d_inner=53)).save_pretrained(tmp_path / "x")
    return tmp_path / "x"


@pytest.mark.world_size(3)
def test_parameters_that_ignore_the_meta_device(xlnet):
    """XLNet creates some with `torch.FloatTensor`, which ignores the device and uses the CPU."""
    reference = models.plain(xlnet, torch.float32)
    models.assert_equal(load(xlnet, bf16=False), reference)


@pytest.mark.world_size(2)
def test_transformers_knows_of_zero3_as_long_as_a_model_lives(llama):
    import gc

    from transformers.integrations import is_deepspeed_zero3_enabled

    from zero_sft import load_model

    for _ in range(3):
        model = load_model(str(llama), ds_config=models.zero3())  # the previous model is freed after this assignment
        gc.collect()
        assert is_deepspeed_zero3_enabled()
    other = load_model(str(llama), ds_config=models.zero3(), loader="stock")
    del model
    gc.collect()
    assert is_deepspeed_zero3_enabled()
    del other
    gc.collect()
    assert not is_deepspeed_zero3_enabled()
