"""JSON that a user wrote: what is wrong with it, and where."""

import pytest

from zero_sft.json_text import DuplicateKeyError, JsonError, NestingError, parse_json


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ('{"a": 1,\n "b": 2,}', "line 2, column 9", "comma"),
        ("[1, 2,\n]", "line 2, column 1", "comma"),
        ('{"a": 1, // note\n "b": 2}', "line 1, column 10", "comment"),
        ('# note\n{"a": 1}', "line 1, column 1", "comment"),
        ('{"a": "x\ty"}', "line 1, column 9", "control character"),
        ("{'a': 1}", "line 1, column 2", "property name"),
    ],
)
def test_a_fault_has_its_place_and_reason(text, place, word):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert caught.value.place_and_reason.startswith(f"{place}: ")
    assert word in str(caught.value)
    assert not str(caught.value).endswith(" at")


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ('[{"a": {"b": 1, "b": 1}}]', DuplicateKeyError, "'b'"),
        ("[" * 100_000, NestingError, "nested"),
        ("1" * 6000, JsonError, "integer"),
    ],
)
def test_faults_without_a_place(text, kind, word):
    with pytest.raises(kind) as caught:
        parse_json(text)
    assert caught.value.position is None
    assert word in caught.value.place_and_reason
    assert "sys." not in str(caught.value)


def test_json_is_parsed():
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e4"], "b": {}}') == {"a": [1, 2.5, None, True, "ä"], "b": {}}
