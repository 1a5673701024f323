"""Runs that train adapters: what they leave, and how they go on."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import small_job
from tests.saving.test_saved_runs import run_refused
from tests.slow import slow
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.commands.export import main as export

LORA = {
    "lora_r": 4, "lora_dropout": 0.0, "per_device_train_batch_size": 2, "packing": False, "max_steps": 6, "learning_rate": 0.01,
    "save_strategy": "steps", "save_steps": 2, "checkpoint_format": "sharded",
}  # fmt: skip
IDS = torch.arange(3, 40).view(1, -1)


def run(folder: Path, out: str, ranks: int = 2, **arguments) -> Path:
    return small_job.run(folder, out, ranks, LORA | arguments)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("lora"), 16)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return run(folder, "whole")


def opened(folder: Path, out: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(model, out).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_adapter_alone_is_written(folder, whole):
    """In the output and in checkpoints, with the tokenizer; plain PEFT opens it, and it has learnt."""
    names = {path.name for path in whole.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"model.safetensors", "config.json"}
    checkpoint = whole / "checkpoint-6"
    assert find_damage(checkpoint, read_manifest(checkpoint), verify=True) is None
    assert equal(adapter(checkpoint), adapter(whole))
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < (folder / "model" / "model.safetensors").stat().st_size
    losses = small_job.losses(folder, "whole")
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert (logits(opened(folder, whole)) - logits(base)).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(whole).chat_template


def test_the_end_is_that_of_the_uninterrupted_run(folder, whole):
    """Bit for bit."""
    again = run(folder, "again", resume_from_checkpoint=whole / "checkpoint-2")
    assert small_job.losses(folder, "again") == small_job.losses(folder, "whole")
    assert equal(adapter(again), adapter(whole))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks(folder, whole, ranks):
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // ranks}
    run(folder, f"on{ranks}", ranks, resume_from_checkpoint=whole / "checkpoint-2", **arguments)
    assert small_job.losses(folder, f"on{ranks}") == pytest.approx(small_job.losses(folder, "whole"), rel=1e-5)


def test_merged_at_the_end(folder, whole):
    """The output is a plain model that computes what the adapter computes; the adapter is in a folder of it."""
    out = run(folder, "merged", merge_adapter=True, save_strategy="no")
    assert equal(adapter(out / "adapter"), adapter(whole))
    assert not (out / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(opened(folder, whole)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scaled_positions_are_kept_for_whoever_merges(folder, tmp_path):
    """An adapter does not hold its base model's config; the run's stands next to it, and the export takes it."""
    out = run(folder, "scaled", model_max_length=1024, max_steps=1, save_strategy="no")
    assert "scaled RoPE" in (out / "logs" / "train.log").read_text()
    assert json.loads((out / "base_config.json").read_text())["rope_parameters"]["factor"] == 2
    assert export(["--adapter", str(out), str(tmp_path / "merged")]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert config.rope_parameters["factor"] == 2
    assert config.use_cache is True


@pytest.mark.slow
def test_trained_on_from_an_adapter(folder, whole):
    """The first loss is the one that the trained adapter gives: below all of the first run's but the last."""
    out = run(folder, "on_from", lora_weight_path=whole, lora_r=None, lora_dropout=None, save_strategy="no", max_steps=2)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    started = run(folder, "not_from", save_strategy="no", max_steps=2)
    assert small_job.losses(folder, "on_from")[0] < small_job.losses(folder, "not_from")[0]
    assert not equal(adapter(out), adapter(started))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    {"use_dora": True, "lora_target_modules": "all-linear"},
    {"bf16": True, "use_rslora": True},
    {"activation_checkpointing": False},
    {"lora_modules_to_save": "lm_head"},
    {"deepspeed": "zero3_offload"},
    {"save_on_each_node": True},
    {"packing": True, "per_device_train_batch_size": 1, "max_steps": 4, "save_steps": 2, "lora_dropout": 0.1},
], ids=lambda arguments: "-".join(arguments))  # fmt: skip
def test_variants_resume(folder, arguments):
    name = "_".join(arguments)
    one = run(folder, f"{name}_whole", **arguments)
    other = run(folder, f"{name}_again", resume_from_checkpoint=one / "checkpoint-2", **arguments)
    assert small_job.losses(folder, f"{name}_again") == small_job.losses(folder, f"{name}_whole")
    assert equal(adapter(one), adapter(other))


@pytest.mark.parametrize(("arguments", "code", "value"), [
    ({"lora_target_modules": "no_such_proj"}, "adapter.no_such_modules", "q_proj, k_proj"),
    slow({"lora_target_modules": '["q_proj", "nothing"]'}, "adapter.no_such_modules", "no module is called nothing"),
    slow({"lora_modules_to_save": "embed_token"}, "adapter.no_such_modules", "embed_token."),
    slow({"lora_target_modules": "lm_head"}, "adapter.on_output_embeddings", "--lora_modules_to_save"),
    slow({"lora_r": None, "lora_weight_path": "model"}, "adapter.config_unusable", "adapter_config.json"),
], ids=["no such modules", "one such module", "no such module to save", "output embeddings", "no adapter"])  # fmt: skip
def test_refused_before_the_weights_are_read(folder, arguments, code, value):
    if "lora_weight_path" in arguments:
        arguments = {**arguments, "lora_weight_path": folder / arguments["lora_weight_path"], "lora_dropout": None}
    run_refused(folder, "refused", code, value, **LORA | arguments)


@pytest.mark.slow
def test_other_adapters_are_not_resumed(folder, whole):
    checkpoint = whole / "checkpoint-2"
    for arguments, value in (
        ({"lora_r": 8}, "r 4 (here 8)"),
        ({"lora_r": None, "lora_dropout": None}, "LoRA: give its options"),
    ):
        run_refused(folder, "refused", "resume.other_adapter", value, **LORA | arguments, resume_from_checkpoint=checkpoint)
