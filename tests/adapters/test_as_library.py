"""PEFT's own functions on a sharded model: add, train, save, load again, merge."""

from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist

from tests import models
from tests.adapters.test_attach import IDS, LR, save_calm
from tests.errors import raises

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
DS = {
    "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": LR}}, "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_calm("llama", tmp_path / "llama")


def loaded(folder):
    from zero_sft import load_model

    return load_model(str(folder), ds_config=models.zero3(bf16=False, **DS), dtype=torch.float32)


def with_adapters(model):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(11)
        return peft.get_peft_model(model, peft.LoraConfig(**CONFIG), autocast_adapter_dtype=False)


@pytest.mark.world_size(2)
def test_trained_saved_loaded_and_merged(folder, tmp_path):
    import deepspeed

    from zero_sft import save_pretrained
    from zero_sft.transformers_internals import zero3_under

    plain = with_adapters(models.plain(folder, torch.float32))
    optimizer = torch.optim.SGD([param for param in plain.parameters() if param.requires_grad], lr=LR)
    for _ in range(3):
        plain(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain.eval()
    adapted = with_adapters(loaded(folder))
    ds = models.zero3(bf16=False, **DS)
    trained = [param for param in adapted.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=adapted, config=ds, model_parameters=trained)
    for _ in range(3):
        engine.backward(engine(input_ids=IDS, labels=IDS).loss)
        engine.step()
    engine.eval()
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        torch.testing.assert_close(engine(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    save_pretrained(adapted, tmp_path / "adapter")
    dist.barrier()
    again = peft.PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError):  # never silently wrong
        again.merge_and_unload()
    again = peft.PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    for name, each in (("merged", adapted), ("merged again", again)):
        save_pretrained(each, tmp_path / name, merge_adapter=True)
        dist.barrier()
        with zero3_under(None), torch.no_grad():
            opened = models.plain(tmp_path / name, torch.float32).eval()
            torch.testing.assert_close(opened(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with raises("arguments.no_effect", "merge_adapter"):
        save_pretrained(loaded(folder), tmp_path / "none", merge_adapter=True)
