"""Runs that add tokens: the tokenizer, the embedding and the export agree."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import small_job
from tests.errors import raises
from tests.saving.test_saved_runs import run_refused
from tests.slow import slow
from zero_sft.commands.data import main as report
from zero_sft.tokenizer.added_tokens import AddedTokens

GIVEN = {
    "add_special_tokens": "<|tool|>", "add_tokens": "<note>", "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
    "checkpoint_format": "sharded", "per_device_train_batch_size": 2, "packing": False,
}  # fmt: skip


def run(folder: Path, out: str, **arguments) -> Path:
    return small_job.run(folder, out, 2, GIVEN | arguments)


@pytest.fixture(scope="module", params=["llama", slow("qwen2")])
def folder(request, tmp_path_factory) -> Path:
    """Untied and tied embeddings; the answers hold the tokens."""
    folder = small_job.make(tmp_path_factory.mktemp("added"), 16, request.param)
    data = json.loads((folder / "data.json").read_text())
    for sample in data:
        sample["conversations"][1]["value"] += "<note><|tool|>"
    (folder / "data.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return run(folder, "whole")


def test_the_export_has_rows_for_the_tokens(folder, whole):
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole)
    ids = tokenizer.encode("<note><|tool|>", add_special_tokens=False)
    assert ids == [before.config.vocab_size, before.config.vocab_size + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<note>"
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.config.vocab_size == len(tokenizer) == before.config.vocab_size + 2
    assert model.get_output_embeddings().weight.shape[0] == rows


@pytest.mark.slow
def test_the_end_is_that_of_the_uninterrupted_run(folder, whole):
    """Bit for bit."""
    again = run(folder, "again", resume_from_checkpoint=whole / "checkpoint-2")
    assert small_job.losses(folder, "again") == small_job.losses(folder, "whole")
    one, other = (load_file(out / "model.safetensors") for out in (whole, again))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_a_run_without_them_does_not_go_on(folder, whole):
    given = {**GIVEN, "resume_from_checkpoint": whole / "checkpoint-2", "add_tokens": "[]", "add_special_tokens": "[]"}
    run_refused(folder, "other", "resume.other_model", "vocab_size", **given)


@pytest.mark.slow
def test_adapters_do_not_hold_the_rows(folder):
    run_refused(folder, "adapters", "arguments.tokens_with_adapters", "rows", **GIVEN, lora_r=4)


@pytest.mark.slow
def test_the_report_on_data_knows_them(folder, capsys):
    words = ["--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "data.json"), "--show", "1"]
    assert report([*words, "--add_tokens", "<note>", "--add_special_tokens", "<|tool|>", "--model_max_length", "512"]) == 0
    assert "<note>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("added", "value"),
    [
        (AddedTokens(ordinary=("<a>", "<a>")), "'<a>'"),
        (AddedTokens(ordinary=("<a>",), special=("<a>",)), "'<a>'"),
        (AddedTokens(special=(" ",)), "' '"),
    ],
)
def test_tokens_that_can_not_be_added(added, value):
    from tests.data import tiny

    with raises("tokenizer.bad_added_tokens", value):
        added.add_to(tiny.byte_tokenizer())
