"""Adapters are saved as PEFT saves them, read again on any number of ranks, and merged as PEFT merges them."""

import json

import pytest
import torch

from tests import models
from tests.adapters.test_attach import CASES, IDS, QUICK, options, save_calm
from tests.errors import raises
from tests.slow import slow


def adapted_model(folder, case, dtype=torch.float32, seed=11):
    """A sharded model with an adapter whose values are all random, so that it changes what the model computes."""
    from zero_sft import load_model
    from zero_sft.adapters.attach import add_adapters, lora_config
    from zero_sft.adapters.peft_internals import saved_tensors
    from zero_sft.zero import shards

    ds = models.zero3(bf16=dtype is torch.bfloat16, train_micro_batch_size_per_gpu=1)
    model = load_model(str(folder), ds_config=ds, dtype=dtype)
    adapted = add_adapters(model, lora_config(options(**CASES[case][1])), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in saved_tensors(adapted).values():
        values = 0.1 * torch.randn(shards.full_numel(tensor), generator=generator)
        with shards.new_part(tensor) as (flat_range, own):
            own.copy_(values[flat_range.start : flat_range.stop])
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float().clone()


@pytest.mark.world_size(3)
@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_plain_peft_reads_and_merges_the_same(folder, tmp_path, case):
    """Plain PEFT opens the saved adapter; what it computes and merges is what the sharded model computes and merges."""
    from peft import PeftModel

    from zero_sft import save_pretrained
    from zero_sft.adapters.merge import merge
    from zero_sft.cluster.world import World
    from zero_sft.saving.export import save_form
    from zero_sft.saving.forms import MergedModel
    from zero_sft.transformers_internals import zero3_under

    world = World.detect()
    plain, plain_to_merge = models.plain(folder, torch.float32), models.plain(folder, torch.float32)
    adapted = adapted_model(folder, case)
    computed = logits(adapted)
    save_pretrained(adapted, tmp_path / "adapter")
    torch.distributed.barrier()
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base_config.json"}
    saved_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved_config["base_model_name_or_path"] == str(folder)
    assert saved_config["inference_mode"] is True
    opened = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(opened), computed, rtol=1e-4, atol=1e-5)
    if case == "embedding":  # of tied embeddings: PEFT would change the head as well
        with raises("adapter.not_mergeable", "model.embed_tokens"):
            merge(adapted, world)
        return
    merge(adapted, world)
    merge(adapted, world)  # an export that failed is tried again: nothing is added twice
    torch.testing.assert_close(logits(adapted), computed, rtol=1e-4, atol=1e-4)
    save_form(MergedModel(adapted), tmp_path / "merged", None, world)
    torch.distributed.barrier()
    merged = PeftModel.from_pretrained(plain_to_merge, tmp_path / "adapter").merge_and_unload().state_dict()
    with zero3_under(None):
        reopened = models.plain(tmp_path / "merged", torch.float32).state_dict()
    assert reopened.keys() == merged.keys()
    for name, tensor in reopened.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["dora", slow("lora"), slow("experts")])
def test_merged_in_bfloat16(folder, tmp_path, case):
    """The arithmetic is PEFT's in 16 bits as well."""
    from peft import PeftModel

    from zero_sft import save_pretrained
    from zero_sft.adapters.merge import merge, merged_tensors
    from zero_sft.cluster.world import World

    plain = models.plain(folder, torch.bfloat16)
    adapted = adapted_model(folder, case, torch.bfloat16)
    save_pretrained(adapted, tmp_path / "adapter")
    torch.distributed.barrier()
    merge(adapted, World.detect())
    opened = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False)
    expected = opened.merge_and_unload().state_dict()
    for name, tensor in merged_tensors(adapted):
        got = models.gather_full(tensor)
        if case == "dora":  # the lengths are summed in another order
            torch.testing.assert_close(got, expected[name], rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(got, expected[name]), name


@pytest.fixture
def two_adapters(tmp_path):
    """A model, and the adapters that plain PEFT has made for it and for another model."""
    from peft import get_peft_model

    from zero_sft.adapters.attach import lora_config

    folder, other = save_calm("llama", tmp_path / "model"), save_calm("qwen2", tmp_path / "other")
    for base, name in ((folder, "adapter"), (other, "others adapter")):
        torch.manual_seed(21)
        plain = get_peft_model(models.plain(base, torch.float32), lora_config(options(lora_r=4, use_dora=True)))
        for param in plain.parameters():
            if param.requires_grad:
                param.data.normal_()
        plain.save_pretrained(tmp_path / name)
    return folder


@pytest.mark.world_size(3)
def test_an_adapter_of_peft_is_read(two_adapters, tmp_path):
    """Each rank reads its ranges of a file that plain PEFT has written; another model's adapter is refused."""
    from safetensors.torch import load_file

    from zero_sft.adapters.attach import read_lora_config
    from zero_sft.adapters.files import load_adapter
    from zero_sft.adapters.peft_internals import saved_tensors
    from zero_sft.cluster.world import World

    world = World.detect()
    assert read_lora_config(tmp_path / "adapter").use_dora
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    CASES["of peft"] = ("llama", {"lora_r": 4, "use_dora": True})
    adapted = adapted_model(two_adapters, "of peft")
    load_adapter(adapted, tmp_path / "adapter", world)
    for name, tensor in saved_tensors(adapted).items():
        assert torch.equal(models.gather_full(tensor), expected[name]), name
    with raises("adapter.other_model", "in another shape"):
        load_adapter(adapted, tmp_path / "others adapter", world)
    with raises("adapter.no_weights", "has no adapter_model.safetensors"):
        load_adapter(adapted, two_adapters, world)
