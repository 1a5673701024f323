"""Text for messages: counts with their nouns, and text from files without what a terminal or a stream can't take."""

import re
from collections.abc import Iterable

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line ends, characters that change the text direction, and lone surrogates."""

_MAX_CHARACTERS = 80


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return the text with unsafe characters escaped as in a Python literal, except those in `keep`.

    Worked example: "a\\ud800 \\x1b[1m" → "a\\\\ud800 \\\\x1b[1m".
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text)


def excerpt(text: object) -> str:
    """Return a name or an excerpt for a message: printable, without line ends, at most 80 characters."""
    line = printable(str(text), keep="")
    return line if len(line) <= _MAX_CHARACTERS else f"{line[: _MAX_CHARACTERS - 3]}..."


def first_of(texts: Iterable[object], limit: int = 3, separator: str = ", ") -> str:
    """Join the first texts, and count the rest: ["a", "b", "c"], 2 → "a, b and 1 more"."""
    shown = list(map(str, texts))
    more = f" and {len(shown) - limit:,} more" if len(shown) > limit else ""
    return separator.join(shown[:limit]) + more


def with_count(number: int, noun: str) -> str:
    """Format a number with its noun: 1, "sample" → "1 sample"; 1200, "sample" → "1,200 samples"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
