"""Tools, calls, their results and thoughts are found in the texts that published templates write."""

import pytest

from tests.data.test_chat_templates import model_of
from tests.data.test_tools import call, chat
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.sample_formats import read_sample
from zero_sft.report.kinds import find_kinds


def found(sample, name):
    """The parts of each kind, in order."""
    _, template = model_of(name)
    _, parsed = read_sample(sample, "data.json, sample 1", ReadOptions())
    text = template.render(parsed.sample).text
    kinds = find_kinds(parsed.sample, text)
    assert [stop for _, stop, _ in kinds[:-1]] <= [start for start, *_ in kinds[1:]]
    return [(kind, text[start:stop]) for start, stop, kind in kinds]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "gptoss"])
def test_tools_calls_and_results(name):
    parts = found(chat(call("weather", {"city": "Paris"}), text=None, result="21 degrees"), name)
    assert [kind for kind, _ in parts] == ["tools", "call", "result"]
    (_, tools), (_, written), (_, result) = parts
    assert all(part in tools for part in ("weather", "The weather.", "The time."))
    assert "Knowledge" not in tools
    assert written.count("Paris") == 1
    assert "weather" in written
    assert result == "21 degrees"


def test_thoughts_in_a_field_and_in_the_text():
    in_field = {"messages": [
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": "Done.", "reasoning_content": "It is easy."},
    ]}  # fmt: skip
    in_text = {"messages": [
        {"role": "user", "content": "Think."}, {"role": "assistant", "content": "<think>\nIt is easy.\n</think>\n\nDone."},
    ]}  # fmt: skip
    for sample in (in_field, in_text):
        assert found(sample, "qwen3") == [("thoughts", "It is easy.")]


def test_plain_samples_have_no_kinds():
    _, parsed = read_sample({"prompt": "a", "completion": "b"}, "data.json, sample 1", ReadOptions())
    assert find_kinds(parsed.sample, "ab") == []
    assert found({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "qwen3") == []
