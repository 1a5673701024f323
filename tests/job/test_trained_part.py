"""Runs that train a part of the model, or parts with different rates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import small_job
from tests.errors import raises
from tests.saving.test_saved_runs import run_refused
from zero_sft.arguments.parse import parse
from zero_sft.job.trained_part import set_rates

OPTIONS = {
    "per_device_train_batch_size": 2, "packing": False, "max_steps": 4, "learning_rate": 0.01, "save_strategy": "steps",
    "save_steps": 2, "checkpoint_format": "sharded",
}  # fmt: skip


def run(folder: Path, out: str, **arguments) -> Path:
    return small_job.run(folder, out, 2, OPTIONS | arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("parts"), 16)


def changed(folder: Path, out: Path) -> set[str]:
    """The names of the weights that training has changed."""
    before, after = load_file(folder / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
def test_unfrozen_layers(folder):
    """The last layer and the norm alone are trained; a resumed run ends as one that was not interrupted, bit for bit."""
    pattern = {"unfreeze": r"layers\.1\.|^model\.norm"}
    whole = run(folder, "whole", **pattern)
    names = changed(folder, whole)
    assert names == {name for name in names if name.startswith(("model.layers.1.", "model.norm."))}
    assert {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    again = run(folder, "again", resume_from_checkpoint=whole / "checkpoint-2", **pattern)
    one, other = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_rates_by_pattern(folder):
    """A rate of 0 leaves the embeddings as they are; the log has the rate of the others."""
    out = run(folder, "rates", learning_rates=json.dumps({"embed_tokens|lm_head": 0.0, r"layers\.0\.": 0.001}))
    names = changed(folder, out)
    assert not names & {"model.embed_tokens.weight", "lm_head.weight"}
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    before, after = load_file(folder / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    moved = [(after[name] - before[name]).abs().mean() for name in sorted(names) if name.endswith("up_proj.weight")]
    assert moved[0] * 3 < moved[1], "a tenth of the rate"
    assert next(entry["learning_rate"] for entry in small_job.history(folder, "rates") if "loss" in entry) == 0.01
    assert "learning rates: 0.01 of " in (out / "logs" / "train.log").read_text()


def test_groups_keep_their_settings():
    params = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("a", "b", "norm")}
    groups = [{"params": [params["a"], params["b"]], "weight_decay": 0.1}, {"params": [params["norm"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_rates(optimizer, params.items(), {"^b": 0.5, "a|b": 0.25})
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(1.0, 0.0, 1), (0.25, 0.1, 1), (0.5, 0.1, 1)], "the usual rate first: the Trainer logs that of the first"


@pytest.mark.parametrize(("words", "code"), [
    (["--unfreeze", "layers.(3"], "arguments.bad_pattern"),
    (["--unfreeze", "norm", "--lora_r", "4"], "arguments.contradiction"),
    (["--learning_rates", '{"a(": 1e-3}'], "arguments.bad_pattern"),
    (["--lora_r", "4", "--lora_target_modules", ".*(q_proj"], "arguments.bad_pattern"),
    (["--learning_rates", '{"a": -1}'], "arguments.out_of_range"),
    (["--learning_rates", '{"a": "much"}'], "arguments.out_of_range"),
])  # fmt: skip
def test_patterns_that_can_not_be_used(words, code):
    with raises(code):
        parse(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [{"unfreeze": "no_such"}, {"learning_rates": json.dumps({"no_such": 0.1})}], ids=["unfreeze", "rates"]
)
def test_a_pattern_that_fits_nothing(folder, option):
    run_refused(folder, "refused", "arguments.pattern_fits_nothing", "no_such", **OPTIONS | option)


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"unfreeze": "lm_head"}, {"learning_rates": '{"lm_head": 0.1}'}], ids=["unfreeze", "rates"])
def test_the_name_of_a_tied_weight(tmp_path, option):
    """The output embeddings of a tied model are trained under the name of the input embeddings."""
    folder = small_job.make(tmp_path, 8)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    run_refused(folder, "refused", "arguments.pattern_fits_nothing", "model.embed_tokens.weight", **OPTIONS | option)
