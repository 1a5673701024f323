"""A JSON list is read item by item, as `json` reads the whole."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zero_sft.data.sources import json_list
from zero_sft.json_text import JsonError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='a"\\\né😀\u2028{}[],:'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def read(text, chunk):
    """All items, or the number of items before the fault, with its line and column."""
    reader, items = json_list.ListReader(io.StringIO(text), chunk=chunk), []
    try:
        items += reader
    except JsonError:
        return reader.line, reader.column
    return items


@given(items=st.lists(VALUES, max_size=5), ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]))
def test_items_are_those_of_the_whole_text(items, ascii_only, indent):
    text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
    for chunk in (1, 7, 1000):
        assert read(text, chunk) == json.loads(text)


@given(items=st.lists(VALUES, max_size=5), at=st.floats(0, 1), put=st.sampled_from(["", "x", '"', ",", "}", "]", "\n"]), cut=st.integers(0, 2))  # fmt: skip  # noqa: E501
def test_a_fault_is_found_where_json_finds_it(items, at, put, cut):
    text = json.dumps(items)
    place = 1 + int(at * (len(text) - 1))
    broken = text[:place] + put + text[place + cut :]
    try:
        expected = json.loads(broken)
    except json.JSONDecodeError as error:
        expected = (error.lineno, error.colno)
    for chunk in (1, 7, 1000):
        assert read(broken, chunk) == expected


@pytest.mark.parametrize("fault", ['{"a": 1, "a": 2}', "[" * 100_000])
def test_a_fault_without_a_position_has_the_line_of_its_item(fault):
    with pytest.raises(JsonError):
        list(reader := json_list.ListReader(io.StringIO(f'[\n1,\n"two\\n",\n  {fault}\n]')))
    assert reader.line == 4


def test_little_of_a_long_list_is_in_memory():
    item = json.dumps({"text": "x" * 1000})
    reader = json_list.ListReader(io.StringIO("[" + ",\n".join([item] * 5000) + "]"), chunk=10_000)
    sizes = [len(reader.text) for _ in reader]
    assert len(sizes) == 5000
    assert len(item) < max(sizes) < 25_000
