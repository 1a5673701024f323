"""Text out of files, made safe to print: a terminal acts on control characters, and no stream takes half characters."""

import re

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line ends, those that turn the direction of a line, and lone surrogates."""

_MOST_CHARACTERS = 80


def printable(text: str, *, keep: str = "\n\t") -> str:
    """A text with what is unsafe to print as Python writes it in a literal; `keep`: line ends may be meant.

    Worked example: "a\\ud800 \\x1b[1m" → "a\\\\ud800 \\\\x1b[1m".
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: object) -> str:
    """A name or an excerpt for a message: printable, without line ends, and not longer than a screen's line."""
    whole = printable(str(text), keep="")
    return whole if len(whole) <= _MOST_CHARACTERS else f"{whole[: _MOST_CHARACTERS - 3]}..."
