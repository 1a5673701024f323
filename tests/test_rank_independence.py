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
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "max_steps": STEPS, "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "constant", "bf16": False,
        "seed": 3,
        **batches,
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


def test_a_run_that_is_resumed_within_an_epoch_goes_on_alike(folder):
    """Also at the epoch's end, where samples are repeated to give every rank one; they are not trained on again."""
    steps = {"packing": False, "max_steps": 10, "num_train_epochs": 2}
    arguments = {"folder": folder, "per_device": 4, "accumulation": 1}
    run_ranks(2, train, {**arguments, "out": "whole", "batches": {**steps, "save_strategy": "steps", "save_steps": 5}}, 200)
    resumed = {**steps, "resume_from_checkpoint": folder / "whole" / "checkpoint-5"}
    run_ranks(2, train, {**arguments, "out": "resumed", "batches": resumed}, 200)
    curves = []
    for out in ("whole", "resumed"):
        history = json.loads((folder / out / "logs" / "history.json").read_text())
        curves.append({entry["step"]: entry["loss"] for entry in history if "loss" in entry})
    assert sorted(curves[1]) == list(range(1, 11))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_the_mean_of_a_run_is_that_of_its_steps_on_all_ranks(folder):
    """Also where the last steps would not be logged."""
    short = {"packing": False, "max_steps": 3}
    for out, logging in (("each", 1), ("seldom", 10)):
        run_ranks(2, train, {"folder": folder, "per_device": 4, "accumulation": 1, "out": out,
                             "batches": {**short, "logging_steps": logging}}, 200)  # fmt: skip
    histories = [json.loads((folder / out / "logs" / "history.json").read_text()) for out in ("each", "seldom")]
    losses = [entry["loss"] for entry in histories[0] if "loss" in entry]
    means = [next(entry["train_loss"] for entry in history if "train_loss" in entry) for history in histories]
    assert means == pytest.approx([sum(losses) / 3] * 2, rel=1e-5)
    assert [entry["step"] for entry in histories[1] if "loss" in entry] == [3]
