"""Adapters exported from checkpoints, and merged into their base model, next to what plain PEFT makes of them."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import models, small_job
from tests.errors import error_codes
from tests.job.test_adapters import run
from tests.slow import slow
from zero_sft.commands.export import main

BF16 = {"bf16": True, "max_steps": 2, "save_steps": 1, "use_dora": True, "lora_modules_to_save": "lm_head"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("adapters"), 8)


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """A run in bfloat16 on two ranks, saved after each of its two steps."""
    return run(folder, "trained", **BF16)


def base(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)


def test_a_checkpoint_is_the_adapter(trained, tmp_path):
    assert main([str(trained / "checkpoint-2"), str(tmp_path / "out")]) == 0
    exported, written = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", trained))
    assert exported.keys() == written.keys()
    assert all(torch.equal(exported[name], written[name]) for name in written)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (trained / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_master_weights_and_their_mean(trained, tmp_path):
    """In fp32, rounded to what the checkpoint has in 16 bits; and the mean of two checkpoints."""
    tensors = {}
    first, second = (str(trained / f"checkpoint-{step}") for step in (1, 2))
    for name, words in {"1": [first], "2": [second], "mean": [str(trained), "--average", "last:2"]}.items():
        assert main([*words, "--out", str(tmp_path / name), "--save_dtype", "float32"]) == 0
        tensors[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    rounded = load_file(trained / "adapter_model.safetensors")
    for name, tensor in tensors["2"].items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor.bfloat16(), rounded[name]), name
        torch.testing.assert_close(tensors["mean"][name], (tensors["1"][name] + tensor) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)])
def test_merged_as_peft_merges(folder, trained, tmp_path, dtype):
    words = [str(trained / "checkpoint-2"), str(tmp_path / "out"), "--merge_adapter", "True"]
    words += ["--save_dtype", "float32"] if dtype is torch.float32 else []
    assert main(words) == 0
    adapter = trained
    if dtype is torch.float32:
        adapter = tmp_path / "masters"
        assert main([str(trained / "checkpoint-2"), str(adapter), "--save_dtype", "float32"]) == 0
    expected = PeftModel.from_pretrained(base(folder, dtype), adapter, autocast_adapter_dtype=False).merge_and_unload()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype is dtype
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize("kind", ["mixtral", slow("llama"), slow("gpt2"), slow("qwen2")])
def test_an_adapter_of_peft(tmp_path, kind):
    """`--adapter`: the base model is the one that its config names; experts are written one by one, as published."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(models.tiny_config(kind)).save_pretrained(tmp_path / "base")
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if kind == "mixtral" else {}
    config = LoraConfig(r=3, **(targets or {"target_modules": "all-linear"}), init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    assert main(["--adapter", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("words", "code"), [
    ("{adapter} {out} --merge_adapter True", "export.no_base_model"),
    ("{model} {out} --merge_adapter True", "export.not_an_adapter"),
    ("{adapter} {out} --adapter {adapter}", "arguments.contradiction"),
    ("--adapter {adapter}", "arguments.required"),
    ("--adapter nowhere {out}", "export.no_checkpoint"),
    ("--adapter {trained} {model}", "export.into_the_models_folder"),
    ("{trained}/checkpoint-2 {out} --average last:3", "export.no_checkpoint"),
    ("--adapter {adapter} {out} --model_name_or_path {other}", "adapter.other_model"),
])  # fmt: skip
def test_refused(folder, trained, tmp_path, capsys, words, code):
    adapter, other = tmp_path / "adapter", models.save_tiny("llama", tmp_path / "other")
    assert main([str(trained), str(adapter)]) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    capsys.readouterr()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    given = {"adapter": adapter, "trained": trained, "model": folder / "model", "other": other, "out": tmp_path / "out"}
    assert main(words.format(**given).split())
    assert code in error_codes(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
