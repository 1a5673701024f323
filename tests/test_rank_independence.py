"""The loss is that of the trained tokens, whoever computes them: the curve does not depend on the number of ranks."""

import json

import pytest

from tests import models
from tests.data import tiny
from tests.runner import run_ranks

STEPS = 20
BATCH = 8


@pytest.fixture
def folder(tmp_path):
    """A model in fp32, and conversations whose answers have very different lengths."""
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
        [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i} " * (1 + 7 * i % 40)}] for i in range(60)
    ]  # no multiple of a step
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return tmp_path


def train(folder, out, per_device, accumulation, batches):
    """One rank's part of a run; the curve is in the logs of `out`."""
    from zero_sft import train as job

    arguments = {
        **batches, "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "max_steps": STEPS, "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "constant", "bf16": False,
        "seed": 3,
    }  # fmt: skip
    assert job.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]) == 0


BATCHES = {
    "packed": {"packing": True, "model_max_length": 256},
    "at random": {"packing": False},
    "grouped": {"packing": False, "train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("batches", BATCHES)
def test_one_two_and_four_ranks_give_one_curve(folder, batches):
    curves = {}
    for ranks, accumulation in ((1, 1), (1, 4), (2, 2), (4, 1)):
        out = f"{ranks}x{accumulation}"
        run_ranks(ranks, train, {"folder": folder, "out": out, "per_device": BATCH // ranks // accumulation,
                                 "accumulation": accumulation, "batches": BATCHES[batches]}, timeout_s=200)  # fmt: skip
        history = json.loads((folder / out / "logs" / "history.json").read_text())
        curves[out] = [entry["loss"] for entry in history if "loss" in entry]
    reference = curves.pop("1x1")
    assert len(reference) == STEPS
    assert reference[-1] < reference[0]
    for out, curve in curves.items():
        assert curve == pytest.approx(reference, rel=1e-5), out
