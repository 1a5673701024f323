"""Adapters on a sharded model compute and learn what PEFT's do on a plain one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import models
from tests.slow import slow

IDS = torch.arange(3, 15).view(1, -1)
LR = 0.05
LINEAR = ["q_proj", "v_proj", "down_proj"]

CASES = {
    "lora": ("llama", {"lora_r": 4, "lora_target_modules": LINEAR}),
    "rslora": ("llama", {"lora_r": 4, "lora_target_modules": ["all-linear"], "use_rslora": True}),
    "dora": ("llama", {"lora_r": 4, "lora_target_modules": LINEAR, "use_dora": True}),
    "embedding": ("qwen2", {"lora_r": 4, "lora_target_modules": ["embed_tokens", "q_proj"]}),
    "saved head": ("llama", {"lora_r": 4, "lora_modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": ("opt", {"lora_r": 4, "lora_bias": "all"}),
    "conv1d": ("gpt2", {"lora_r": 4}),
    "experts": ("mixtral", {"lora_r": 4, "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "pattern": ("gpt_neox", {"lora_r": 4, "lora_target_modules": [r".*layers\.1\..*query_key_value"]}),
}


QUICK = ("dora", "experts")


def save_calm(kind, folder, **changes):
    """Save a model with the values of its class's initialisation, so that rounding stays small through some steps."""
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(models.tiny_config(kind, **changes)).save_pretrained(folder)
    return folder


def options(**given):
    from zero_sft.adapters.options import LoraOptions

    return LoraOptions(**{"lora_dropout": 0.0, **given})


def plain_steps(folder, given, steps=3):
    """The adapter's values before and after some steps of plain PEFT, and the logits at both times."""
    from peft import get_peft_model

    from zero_sft.adapters.attach import lora_config
    from zero_sft.adapters.peft_internals import saved_tensors

    model = models.plain(folder, torch.float32)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(11)
        adapted = get_peft_model(model, lora_config(options(**given)))
    adapted.eval()
    outputs, values = [], []
    trained = [param for param in adapted.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    for step in range(steps + 1):
        if step in (0, steps):
            outputs.append(adapted(input_ids=IDS).logits.detach())
            values.append({name: tensor.detach().clone() for name, tensor in saved_tensors(adapted).items()})
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs, values


@pytest.mark.world_size(3)
@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_as_plain_peft(folder, case):
    import deepspeed

    from zero_sft import load_model
    from zero_sft.adapters.attach import add_adapters, lora_config
    from zero_sft.adapters.peft_internals import saved_tensors
    from zero_sft.zero import shards

    _, given = CASES[case]
    outputs, values = plain_steps(folder, given)
    optimizer = {"type": "SGD", "params": {"lr": LR}}  # Adam would magnify rounding where gradients are nearly 0
    ds = models.zero3(
        bf16=False,
        train_micro_batch_size_per_gpu=1,
        optimizer=optimizer,
        zero_allow_untested_optimizer=True,
        gradient_clipping=0.0,
    )
    model = load_model(str(folder), ds_config=ds, dtype=torch.float32)
    adapted = add_adapters(model, lora_config(options(**given)), seed=11)
    adapted.eval()
    tensors = saved_tensors(adapted)
    assert tensors.keys() == values[0].keys()
    assert all(shards.is_sharded(param) for param in adapted.parameters())
    for name, tensor in tensors.items():
        assert torch.equal(models.gather_full(tensor), values[0][name]), name
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, outputs[0], rtol=1e-5, atol=1e-5)
    trained = [param for param in adapted.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=adapted, config=ds, model_parameters=trained)
    engine.eval()  # no dropout in either
    for _ in range(3):
        engine.backward(engine(input_ids=IDS, labels=IDS).loss)
        engine.step()
    for name, tensor in saved_tensors(adapted).items():
        torch.testing.assert_close(
            models.gather_full(tensor), values[1][name], rtol=1e-3, atol=5e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        torch.testing.assert_close(engine(input_ids=IDS).logits, outputs[1], rtol=1e-3, atol=1e-3)
