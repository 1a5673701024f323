"""Training on packed rows is training on their samples: the same losses, step by step, whatever the attention."""

import json

import pytest

from tests import models
from tests.data import tiny
from tests.runner import run_ranks

STEPS = 4
SAMPLES = 24


@pytest.fixture
def folder(tmp_path):
    """A model in fp32, and conversations of very different lengths, which make one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, model = tiny.byte_tokenizer(tiny.CHATML), tmp_path / "model"
    config = models.tiny_config(
        "llama", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    talks = [
        [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i} " * (1 + 7 * i % 40)}] for i in range(SAMPLES)
    ]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return tmp_path


def rows_when_packed(folder) -> int:
    from zero_sft.data.packing import pack

    return len(pack(tiny.prepare(folder / "data.json", tiny.byte_tokenizer(tiny.CHATML), model_max_length=256).dataset, 256))


def train(folder, out, arguments):
    """One rank's part of a run; the curve is in the logs of `out`."""
    from zero_sft import train as job

    arguments = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "data_cache_dir": folder / "cache", "model_max_length": 256, "max_steps": STEPS, "save_strategy": "no",
        "logging_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "constant", "bf16": False, "seed": 3, **arguments,
    }  # fmt: skip
    assert job.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_unpacked_give_one_curve(folder, attention):
    """Each step is one epoch, of all samples, so the batches are the same."""
    rows, curves = rows_when_packed(folder), []
    assert rows < SAMPLES // 2
    for packing, batch in (("True", rows), ("False", SAMPLES)):
        run_ranks(1, train, {"folder": folder, "out": packing, "arguments": {
            "packing": packing, "per_device_train_batch_size": batch, "attn_implementation": attention}})  # fmt: skip
        history = json.loads((folder / packing / "logs" / "history.json").read_text())
        seen = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
        if packing == "True":
            assert STEPS * rows * 200 < seen[-1] <= STEPS * rows * 256, "tokens of all rows"
        curves.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def fail(folder):
    """One rank's part of a run that ends with an error on every rank."""
    from zero_sft import distributed

    said = []
    distributed.leave_with = lambda error, world: said.append(str(error)) or 0
    train(folder, "out", {"lazy_preprocess": "True", "per_device_train_batch_size": 1, "model_max_length": 128})
    assert "nothing is trained on in the batches of step 1" in said[0]


def test_a_step_in_which_nothing_is_trained_on_ends_the_run(folder):
    """With lazy tokenising, whose samples may be cut off before their answers."""
    talk = [{"from": "human", "value": "x" * 400}, {"from": "gpt", "value": "y"}]
    (folder / "data.json").write_text(json.dumps([{"conversations": talk}] * 4))
    run_ranks(2, fail, {"folder": folder})
