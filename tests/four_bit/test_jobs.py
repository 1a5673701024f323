"""Runs that train adapters on a base model in 4 bits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import small_job
from tests.errors import raises
from tests.job.test_adapters import LORA, adapter, equal, logits, opened, run
from tests.saving.test_saved_runs import run_refused
from zero_sft.arguments import parse
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.commands.export import main as export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_job.make(tmp_path_factory.mktemp("qlora"), 16)


@pytest.fixture(scope="module")
def whole(folder):
    return run(folder, "whole", q_lora=True, lora_target_modules="all-linear", bf16=True)


def test_an_ordinary_adapter_is_written(folder, whole, tmp_path):
    """PEFT opens it with the unquantised model, to which the export adds it; it has learnt."""
    checkpoint = whole / "checkpoint-6"
    assert find_damage(checkpoint, read_manifest(checkpoint), verify=True) is None
    assert equal(adapter(checkpoint), adapter(whole))
    losses = small_job.losses(folder, "whole")
    assert losses[-1] < losses[0]
    assert "quantised to 4 bits while reading" in (whole / "logs" / "train.log").read_text()
    assert export(["--adapter", str(whole), str(tmp_path / "merged"), "--save_dtype", "float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(opened(folder, whole)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_losses_are_close_to_those_of_the_unquantised_model(folder, whole):
    run(folder, "unquantised", lora_target_modules="all-linear", bf16=True)
    found, expected = small_job.losses(folder, "whole"), small_job.losses(folder, "unquantised")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_the_end_is_that_of_the_uninterrupted_run(folder, whole):
    """Bit for bit; and another quantisation is another run."""
    arguments = {"q_lora": True, "lora_target_modules": "all-linear", "bf16": True}
    again = run(folder, "again", resume_from_checkpoint=whole / "checkpoint-2", **arguments)
    assert small_job.losses(folder, "again") == small_job.losses(folder, "whole")
    assert equal(adapter(again), adapter(whole))
    arguments |= LORA | {"bnb_4bit_use_double_quant": False, "resume_from_checkpoint": whole / "checkpoint-2"}
    run_refused(folder, "other", "resume.other_adapter", "bnb_4bit_use_double_quant", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks(folder, ranks):
    """The base model's values are the same on any number."""
    arguments = {"q_lora": True, "lora_target_modules": "all-linear"}
    run(folder, f"on2for{ranks}", **arguments)
    run(folder, f"on{ranks}", ranks, per_device_train_batch_size=1, gradient_accumulation_steps=4 // ranks, **arguments)
    assert small_job.losses(folder, f"on{ranks}") == pytest.approx(small_job.losses(folder, f"on2for{ranks}"), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--q_lora", "True"], "arguments.no_effect", "--lora_r"),
        (["--lora_r", "4", "--bnb_4bit_quant_type", "fp4"], "arguments.no_effect", "--load_in_4bit"),
        (["--lora_r", "4", "--q_lora", "True", "--merge_adapter", "True"], "arguments.contradiction", "zero_sft.export"),
        (["--lora_r", "4", "--q_lora", "True", "--use_dora", "True"], "arguments.contradiction", "DoRA"),
        (["--lora_r", "4", "--q_lora", "True", "--loader", "stock"], "arguments.contradiction", "loader"),
        (["--lora_r", "4", "--load_in_8bit", "True"], "arguments.no_meaning", "--load_in_4bit"),
    ],
)
def test_arguments_that_can_not_be_used(argv, code, words):
    with raises(code, words):
        parse(argv)
