"""Data by hub id, from a stand-in hub: `org/name:split`, downloaded once, its commit in the key."""

import json
import os
import subprocess
import sys

import pytest

from tests.data import tiny
from tests.errors import error_codes
from tests.hub import standin

REPO = "someone/talks"

COMMAND = "import sys; from zero_sft.commands.data import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def repo(tmp_path):
    """A dataset with two splits, and a folder with a tokenizer."""
    for split, answers in (("train", ("one", "two")), ("test_sft", ("three",))):
        talks = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": each}]} for each in answers]
        (tmp_path / "repo").mkdir(exist_ok=True)
        (tmp_path / "repo" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, talks)))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (tmp_path / "repo" / "README.md").write_text(f"{card}  - split: test_sft\n    path: test_sft.jsonl\n---\n")
    tiny.byte_tokenizer(tiny.CHATML).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def prepared(hub, folder, data, **environment):
    """The command's exit status and output."""
    home = folder / "home"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"),
           "HF_HUB_OFFLINE": "0", **environment}  # fmt: skip
    words = ["--model_name_or_path", str(folder / "model"), "--data_path", data, "--model_max_length", "100", "--show", "9"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_split_is_downloaded_once_and_found_again(repo):
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), repo / "repo")]})) as hub:
        status, shown = prepared(hub, repo, REPO)
        assert status == 0, shown
        assert f"{REPO}:train: 2 of 2 samples" in shown, shown
        assert "one" in shown
        assert "three" not in shown
        assert hub.downloads("train.jsonl") == 1
        assert "three" in prepared(hub, repo, f"{REPO}:test_sft")[1]
        again = prepared(hub, repo, REPO)[1]
        assert hub.downloads("train.jsonl") == 1
        assert "two" in again
    offline = prepared(hub, repo, REPO, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert offline[0] == 0, offline
    assert len(list((repo / "home" / "datasets" / "zero_sft").iterdir())) == 4  # two splits, each packed, too


@pytest.mark.slow
def test_another_commit_is_other_data(repo):
    history = [(standin.commit_hash("1"), repo / "repo")]
    with standin.serve(standin.Hub({REPO: history})) as hub:
        assert "one" in prepared(hub, repo, REPO)[1]
        (repo / "new").mkdir()
        (repo / "new" / "train.jsonl").write_text((repo / "repo" / "train.jsonl").read_text().replace("one", "uno"))
        history.append((standin.commit_hash("2"), repo / "new"))
        assert "uno" in prepared(hub, repo, REPO)[1]


@pytest.mark.slow
def test_what_the_hub_has_not(repo):
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), repo / "repo")]})) as hub:
        for data, value in (("someone/nothing", "someone/nothing"), (f"{REPO}:valid", "'valid'")):
            status, shown = prepared(hub, repo, data)
            assert status == 2, shown
            assert error_codes(shown) == ["data.hub_dataset_unavailable"]
            assert value in shown
            assert "Traceback" not in shown


SAME_ROWS = """
import itertools, json, sys
from pathlib import Path
from transformers import AutoTokenizer
from zero_sft.data.mixture import DatasetSpec, prepare_sources
from zero_sft.data.sources.data_path import parse_sources
from zero_sft.data.stream import Stream
from zero_sft.data.templates.choose import choose_template

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
template = choose_template(None, tokenizer)
found = []
for text in sys.argv[3:]:
    spec = DatasetSpec(sources=parse_sources(text), model_max_length=5000, root=Path(sys.argv[2]))
    columns = ["input_ids", "labels"]
    found.append(prepare_sources(spec, tokenizer, template).rows.select_columns(columns).to_list())
    first = next(iter(Stream(spec, spec.pipeline(tokenizer, template), shuffle=False)))
    found.append(first.rows.select(columns).to_pylist())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_same_samples_give_the_same_tokens_from_everywhere(tmp_path):
    """As JSON lines, Parquet and a dataset of the hub, prepared and streamed; calls have other arguments in each row."""
    from datasets import Dataset

    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
        "type": "object", "properties": {"at": {"type": "string"}}}}}  # fmt: skip
    rows = [
        {"tools": [tool] if n else [], "messages": [
            {"role": "user", "content": f"{n}?", "tool_calls": None},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "look", "arguments": {("at", "to")[n % 2]: str(n)}}}]},
            {"role": "tool", "content": "seen", "tool_calls": None},
            {"role": "assistant", "content": f"It is {n}.", "tool_calls": None}]}
        for n in range(1, 5)
    ]  # fmt: skip
    (tmp_path / "repo").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "train.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from zero_sft.data.templates.named import HERMES

    tiny.byte_tokenizer(HERMES).save_pretrained(tmp_path / "model")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
           "HF_HUB_OFFLINE": "0"}  # fmt: skip
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), tmp_path / "repo")]})) as hub:
        done = subprocess.run(
            [sys.executable, "-c", SAME_ROWS, tmp_path / "model", tmp_path / "cache", tmp_path / "rows.jsonl",
             tmp_path / "repo" / "train.parquet", REPO, f"hf://datasets/{REPO}/train.parquet"],
            env={**env, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert len(first) == 4
    assert len(others) == 7
    assert all(other == first for other in others)
