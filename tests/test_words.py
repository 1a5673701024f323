"""The words of the package: docstrings that begin as sentences of English do, and none of the words that puzzle readers."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import zero_sft

PACKAGE = Path(zero_sft.__file__).parent

OPENINGS = re.compile(r"(What|Which|Where|How)\b")
"""A docstring is an imperative or a noun phrase, not a clause that stands for a noun."""

AVOIDED = {
    r"(?<![Tt]here )\bis no \b(?!longer|more)": "is not a",
    r"\bnone that\b": "not one that",
    r"\bbeside\b": "next to, as well as",
    r"\banew\b": "again",
    r"\bof (its|their) own\b": "its, their",
    r"\bby (itself|themselves)\b": "alone, without communicating",
    r"\bso many\b": "the number",
    r"\bwithout a word\b": "silently",
    r", too[.,;:)]": "also, as well",
    r"\berrors as theirs\b": "raises what they raise",
}


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Lines and docstrings of a module, its classes and functions, and of the texts that stand below a constant."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of all comments and strings, docstrings among them, without what stands in backticks."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], " ".join(re.sub(r"`[^`]*`", "", token.string).split())


def openings(source: str) -> list[tuple[int, str]]:
    return [(line, text.splitlines()[0]) for line, text in docstrings(source) if text and OPENINGS.match(text)]


def avoided(source: str) -> list[tuple[int, str]]:
    found = []
    for line, text in texts(source):
        for pattern, better in AVOIDED.items():
            found += [(line, f"{match[0]!r}: {better}") for match in re.finditer(pattern, text)]
    return found


def report(check) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{line} {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in check(path.read_text(encoding="utf-8"))
    ]


def test_docstrings_begin_plainly():
    assert report(openings) == []


def test_no_word_that_puzzles_readers():
    assert report(avoided) == []


@pytest.mark.parametrize("text", ["is no file", "beside it", "made anew", "a name of its own", "so many rows", "this, too."])
def test_the_list_finds_them(text):
    assert avoided(f'"""{text}"""')
    assert avoided(f"x = 1  # {text}")
    assert not avoided('"""It is no longer there."""')
    assert openings('def f():\n    """What it is."""')
    assert not openings('def f():\n    """Whatever it is."""')
