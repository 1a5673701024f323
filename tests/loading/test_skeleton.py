"""Compare several living models in one process, of any class and from both loaders, with plain loading."""

import pytest
import torch
import transformers

from tests import models
from tests.errors import raises

CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel",
)  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


@pytest.fixture
def qwen3(tmp_path):
    return models.save_tiny("qwen3", tmp_path / "qwen3")


@pytest.mark.world_size(2, timeout_s=280)
def test_one_after_the_other(llama, qwen3):
    """A class with a head creates its base model by `from_config`, which opened another `zero.Init` next to a living model."""
    from zero_sft import load_model

    references = {}
    for name in CLASSES:
        for folder in (llama, qwen3):
            torch.manual_seed(5)
            references[name, folder] = getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16)
    alive = []
    for loader in ("sharded", "stock", "sharded"):
        for (name, folder), reference in references.items():
            torch.manual_seed(5)
            model = load_model(str(folder), ds_config=models.zero3(), model_class=getattr(transformers, name), loader=loader)
            alive.append(model)
            assert type(model) is type(reference)
            if loader == "sharded":
                models.assert_equal(model, reference)
                continue
            missing = set(model.load_report.missing_keys)
            for key, param in model.named_parameters():
                if key not in missing:
                    from zero_sft.zero import shards

                    span = shards.local_range(param)
                    want = reference.get_parameter(key).detach().reshape(-1)[span.start : span.stop]
                    assert torch.equal(shards.local_shard(param).cpu(), want), (name, key)
                    shards.release_shard(param)


@pytest.mark.world_size(1)
def test_next_to_a_config_that_somebody_else_holds(llama):
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    from zero_sft import load_model

    torch.manual_seed(5)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16)
    held = HfDeepSpeedConfig(models.zero3(train_micro_batch_size_per_gpu=1))
    torch.manual_seed(5)
    model = load_model(str(llama), ds_config=models.zero3(), model_class=transformers.AutoModelForSequenceClassification)
    models.assert_equal(model, reference)
    assert is_deepspeed_zero3_enabled()
    assert held.is_zero3()


@pytest.mark.world_size(1)
@pytest.mark.parametrize("loader", ["sharded", "stock"])
def test_each_in_its_own_engines_dtype(llama, loader):
    """transformers' loader used to build every model under the config of the first living one."""
    from zero_sft import load_model
    from zero_sft.zero import shards

    references = {bf16: models.plain(llama, torch.bfloat16 if bf16 else torch.float32) for bf16 in (True, False)}
    alive = []
    for bf16 in (True, False, True):
        alive.append(load_model(str(llama), ds_config=models.zero3(bf16), loader=loader))
        for name, param in alive[-1].named_parameters():
            want = references[bf16].get_parameter(name).detach().reshape(-1)
            assert param.dtype == want.dtype, name
            assert torch.equal(shards.local_shard(param).cpu(), want), name
            shards.release_shard(param)


@pytest.mark.world_size(1)
def test_attention_that_cant_be_used_is_an_argument_error(llama):
    from zero_sft import load_model

    for loader in ("sharded", "stock"):
        for name, parts in (
            ("spda", ("'spda'", "eager, sdpa", "flash_attention_2")),
            ("flash_attention_2", ("flash_attention_2", "LlamaForCausalLM takes")),
            ("flash_attention_3", ("flash_attention_3",)),
        ):
            with raises("arguments.attention_unusable") as caught:
                load_model(str(llama), ds_config=models.zero3(), attn_implementation=name, loader=loader)
            for part in parts:
                assert part in str(caught.value), str(caught.value)
