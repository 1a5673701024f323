"""What forward computes with is what is written, however a model was changed since it was loaded; or nothing is written."""

import copy

import pytest
import torch
from torch import nn

from tests import models
from tests.errors import raises

IDS = torch.arange(3, 15).view(1, -1)
KEEPS_NOTHING = {"stage3_param_persistence_threshold": 0}


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


def loaded(folder, **zero):
    """The model, and the DeepSpeed config it was loaded with."""
    from zero_sft import load_model

    optimizer = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
    ds = models.zero3(bf16=False, train_micro_batch_size_per_gpu=1, optimizer=optimizer, zero_optimization=zero)
    return load_model(str(folder), ds_config=ds, dtype=torch.float32), ds


def started(model, ds):
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, config=ds, model_parameters=[p for p in model.parameters() if p.requires_grad]
    )
    return engine


def step(engine, times=2):
    engine.train()
    for _ in range(times):
        engine.backward(engine(input_ids=IDS, labels=IDS).loss)
        engine.step()
    engine.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def exported(model, folder):
    """The logits of a plain model that is filled with what was written; its class, without anything of ZeRO."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaForCausalLM

    from zero_sft import save_pretrained

    save_pretrained(model, folder)
    torch.distributed.barrier()
    plain = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).eval()
    unread = plain.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unread.missing_keys
    return logits(plain), unread.unexpected_keys


def assert_what_forward_computes(model, folder, unlike=None):
    want = logits(model)
    got, _ = exported(model, folder)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if unlike is not None:
        assert not torch.allclose(want, unlike, atol=1e-3), "the change is seen"


@pytest.mark.world_size(2)
def test_changes_in_place(llama, tmp_path):
    """Of what stays gathered, outside of `GatheredParameters`; of what does not, inside; and a step after it."""
    import deepspeed

    model, ds = loaded(llama)
    before = logits(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        model.lm_head.weight.add_(0.5 * model.lm_head.weight.sign())
    assert_what_forward_computes(model, tmp_path / "before", before)
    engine = started(model, ds)
    step(engine)  # from here on, DeepSpeed keeps small parameters gathered
    stepped = logits(engine)
    with torch.no_grad():
        for param in engine.module.parameters():
            param.mul_(0.8)
    assert_what_forward_computes(engine, tmp_path / "engine", stepped)
    step(engine)
    assert_what_forward_computes(engine, tmp_path / "step")


@pytest.mark.world_size(2)
def test_casts(llama, tmp_path):
    """A partitioned model that was cast keeps its shards' dtype; they are cast as they are written."""
    from safetensors.torch import load_file

    from zero_sft import load_model, save_pretrained

    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "bf16")
    save_pretrained(model.float(), tmp_path / "fp32")
    torch.distributed.barrier()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "fp32"))
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)


@pytest.mark.world_size(2)
@pytest.mark.slow
def test_swapped_and_added_modules(llama, tmp_path):
    from unittest import mock

    from zero_sft.saving import readable

    model, ds = loaded(llama)
    before = logits(model)
    torch.manual_seed(3)
    model.lm_head = nn.Linear(32, 131, bias=False)
    model.model.layers[0].mlp.down_proj = nn.Linear(53, 32, bias=False)
    assert_what_forward_computes(model, tmp_path / "swapped", before)
    model.value_head = nn.Linear(32, 1)
    with mock.patch.object(readable.logger, "warning") as warning:
        _, unexpected = exported(model, tmp_path / "added")
    assert sorted(unexpected) == ["value_head.bias", "value_head.weight"]
    assert warning.called == (torch.distributed.get_rank() == 0)
    engine = started(model, ds)
    step(engine)
    assert_what_forward_computes(engine, tmp_path / "engine")


@pytest.mark.world_size(2)
def test_a_model_that_its_config_does_not_make_is_refused(llama, tmp_path):
    from zero_sft import save_pretrained

    model, _ = loaded(llama)
    head = model.lm_head
    model.lm_head = nn.Linear(32, 140, bias=False)
    with raises("export.shape_not_in_config", "lm_head.weight", "[140, 32]", "[131, 32]"):
        save_pretrained(model, tmp_path / "out")
    model.lm_head = nn.Sequential(head)
    with raises("export.model_lacks_tensors", "lm_head.weight", "lm_head.0.weight"):
        save_pretrained(model, tmp_path / "out")
    with raises("export.wrapped_model", "Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.world_size(2)
def test_heads_that_were_tied_while_it_ran(llama, tmp_path):
    """Both names are written where the class does not tie them by its config, and the flag says what is stored."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from zero_sft import save_pretrained

    model, _ = loaded(llama)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_pretrained(model, tmp_path / "out")
    torch.distributed.barrier()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is True


@pytest.mark.world_size(2)
def test_heads_that_differ_though_the_config_ties_them(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from zero_sft import load_model, save_pretrained

    folder = models.save_tiny("qwen2", tmp_path / "qwen2", max_shard_size="1GB")
    if torch.distributed.get_rank() == 0:
        stored = load_file(folder / "model.safetensors")
        stored["lm_head.weight"] = torch.randn(131, 30).bfloat16()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    torch.distributed.barrier()
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is True
    model = load_model(str(folder), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out")
    torch.distributed.barrier()
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False


@pytest.mark.world_size(2)
@pytest.mark.parametrize("zero", [{}, KEEPS_NOTHING], ids=["gathered", "partitioned"])
@pytest.mark.slow
def test_an_adapter_that_was_trained_and_merged(llama, tmp_path, zero):
    """PEFT's own merge, by the remedy that the refusal of the inner model gives: the export answers as the adapted one did."""
    import deepspeed
    from peft import LoraConfig, get_peft_model

    from zero_sft import save_pretrained
    from zero_sft.saving.readable import MERGE_FIRST

    base, ds = loaded(llama, **zero)
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    engine = started(model, ds)
    step(engine, times=4)
    adapted = logits(engine)
    assert not torch.allclose(adapted, before, atol=1e-3)
    with raises("export.model_lacks_tensors", "merge_and_unload"):
        save_pretrained(base, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    scope = {"deepspeed": deepspeed, "model": model}
    exec("\n".join(line.removeprefix("    ") for line in MERGE_FIRST.splitlines()[1:3]), scope)
    got, unexpected = exported(scope["merged"], tmp_path / "out")
    assert not unexpected
    torch.testing.assert_close(got, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.world_size(2)
def test_an_adapter_that_was_merged_before_the_engine(llama, tmp_path):
    import deepspeed
    from peft import LoraConfig, get_peft_model

    model, ds = loaded(llama)
    before = logits(model)
    torch.manual_seed(4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with deepspeed.zero.GatheredParameters(list(adapted.parameters()), modifier_rank=0):
        merged = adapted.merge_and_unload()
    merged.requires_grad_(True)  # PEFT has frozen it
    assert_what_forward_computes(merged, tmp_path / "merged", before)
    engine = started(merged, ds)
    assert_what_forward_computes(engine, tmp_path / "engine", before)


@pytest.mark.world_size(1)
def test_the_class_that_was_saved_is_what_the_config_names(tmp_path):
    import json

    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    from zero_sft import load_model, save_pretrained

    torch.manual_seed(5)
    config = models.tiny_config("llama", num_labels=3, pad_token_id=0)
    LlamaForSequenceClassification(copy.deepcopy(config)).save_pretrained(tmp_path / "classifier")
    plain = models.save_tiny("llama", tmp_path / "llama")
    settings = json.loads((plain / "config.json").read_text())
    del settings["architectures"]
    (plain / "config.json").write_text(json.dumps(settings))
    ds = models.zero3(bf16=False)
    classifier = load_model(
        str(tmp_path / "classifier"), ds_config=ds, model_class=AutoModelForSequenceClassification, dtype=torch.float32
    )
    save_pretrained(classifier, tmp_path / "one")
    save_pretrained(load_model(str(plain), ds_config=ds, dtype=torch.float32), tmp_path / "other")
    named = [json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("one", "other")]
    assert named == [["LlamaForSequenceClassification"], ["LlamaForCausalLM"]]
