"""The file of --sample_prompts: what it may hold, and what is refused."""

import pytest

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
