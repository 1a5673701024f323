"""The file of --sample_prompts: what it may hold, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import small_job
from tests.errors import raises
from zero_sft.job.generation import _until_stop, read_prompts


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('["a", "b\\nc"]', ["a", "b\nc"]),
        ("a\n\n  b \n", ["a", "b"]),
        ('Read this:\n{"a": 1}\n', ["Read this:", '{"a": 1}']),
        ('"a"\n', ['"a"']),
    ],
)
def test_a_list_or_lines(tmp_path, text, prompts):
    (tmp_path / "prompts").write_text(text)
    assert read_prompts(tmp_path / "prompts") == prompts


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("[1, null]", "not_a_text", ["prompt 1", "got 1", "list of texts"]),
        ('["a", null]', "not_a_text", ["prompt 2", "got null"]),
        ('["a", {"prompt": "b"}]', "not_a_text", ["prompt 2", "{'prompt': 'b'}"]),
        ('{"a": 1}', "not_a_text", ["JSON object", "list of texts"]),
        ('{\n"a": 1\n}\n', "not_a_text", ["JSON object"]),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "not_a_text", ["JSON object"]),
        ("[]", "no_prompts", ["list of texts"]),
        (" \n", "empty_file", []),
        ('["a",]', "prompts_not_json", ["line 1, column 6", "comma"]),
        ("[" * 5000, "prompts_not_json", ["nested"]),
    ],
)
def test_what_is_not_a_prompt(tmp_path, text, code, values):
    (tmp_path / "prompts").write_text(text)
    with raises(f"data.{code}", "prompts", *values):
        read_prompts(tmp_path / "prompts")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("a</s>b", ["</s>"], ("a", True)), ("a USER: b</s>", ["</s>", " USER:"], ("a", True)), ("a", ["</s>"], ("a", False)),
     ("", [], ("", False)), ("</s>", ["</s>"], ("", True))],
)  # fmt: skip
def test_an_answer_ends_at_the_first_stop_text(text, stops, expected):
    assert _until_stop(text, stops) == expected


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=300)
def test_answers_while_the_model_is_trained(tmp_path):
    """They are in the metrics, and the run is the same as without them, bit for bit; also if a step's dropout is random."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        small_job.make(tmp_path, 8)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
        (tmp_path / "prompts.txt").write_text("1?\n2?\n")
    dist.barrier()
    options = {"per_device_train_batch_size": 1, "packing": False, "max_steps": 5}
    small_job.train(tmp_path, "plain", **options)
    small_job.train(tmp_path, "answering", sample_prompts=tmp_path / "prompts.txt", sample_every=2, **options)
    if dist.get_rank() == 0:
        lines = (tmp_path / "answering" / "logs" / "metrics.jsonl").read_text().splitlines()
        events = [line for line in map(json.loads, lines) if line.get("event") == "answers"]
        assert [event["step"] for event in events] == [2, 4]
        assert [pair["prompt"] for pair in events[0]["answers"]] == ["1?", "2?"]
        assert all(isinstance(pair["answer"], str) for pair in events[1]["answers"])
        assert small_job.losses(tmp_path, "answering") == small_job.losses(tmp_path, "plain")
        one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "answering"))
        assert all(torch.equal(one[name], other[name]) for name in one)
