"""Tests of `zero_sft.printable`: control characters are escaped as in a Python literal, all other characters are kept."""

import logging

import pytest

from zero_sft.console.log import _Elapsed
from zero_sft.errors import DataError
from zero_sft.printable import excerpt, printable, with_count

TEXTS = [
    ("plain, über 你好 👩‍👩‍👧‍👦\u00a0\u3000", "plain, über 你好 👩‍👩‍👧‍👦\u00a0\u3000"),
    ("a\ud800", "a\\ud800"),
    ("\x1b[31mred\x9b0m\x07", "\\x1b[31mred\\x9b0m\\x07"),
    ("a\u2028b\u202ec", "a\\u2028b\\u202ec"),
    ("one\r\ntwo\tthree", "one\\r\ntwo\tthree"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_printable(text, expected):
    assert printable(text) == expected == printable(expected)
    assert excerpt(text) == expected.replace("\n", "\\n").replace("\t", "\\t")
    assert str(DataError(text, code="data.x")) == expected
    record = logging.LogRecord("zero_sft", logging.INFO, "", 0, "%s", (text,), None)
    _Elapsed(0).format(record).encode()
    assert "\x1b" not in _Elapsed(0).format(record)


def test_an_excerpt_ends():
    assert len(excerpt("x" * 1000)) == 80
    assert excerpt(["a\n"]) == "['a\\n']"


def test_a_count_agrees_with_its_noun():
    assert [with_count(number, "sample") for number in (0, 1, 1200)] == ["0 samples", "1 sample", "1,200 samples"]
