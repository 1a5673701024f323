"""Help of a command: find the requested topic and format options as text."""

import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence

from zero_sft.options.spec import OptionSpec

WIDTH = 118

_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)\.\s+(?=[A-Z`])")


def wants_help(argv: Sequence[str]) -> bool:
    """Return True if the command line asks for help."""
    return any(word in ("-h", "--help") or word.startswith("--help=") for word in argv)


def write_help(argv: Sequence[str], help_text: Callable[[str | None], str | None], *, quiet: bool = False) -> int:
    """Write the requested help to stdout unless `quiet`, and return the exit status: 0, or 2 if nothing matches a name."""
    text, status = "", 0
    for topic in _topics(argv) or [None]:
        part = help_text(topic)
        if part is None:
            part, status = f"No argument has {topic!r} in its name or text. `--help` lists all arguments.\n", 2
        text += part
    sys.stdout.write("" if quiet else text)
    return status


def _topics(argv: Sequence[str]) -> list[str]:
    """Return the requested names: `--help=NAME`, or the words after `--help`; a single one may have dashes."""
    position = next(index for index, word in enumerate(argv) if word in ("-h", "--help") or word.startswith("--help="))
    word, after = argv[position], list(argv[position + 1 :])
    if word.startswith("--help="):
        return [word.removeprefix("--help=")]
    if len(after) == 1:
        return [after[0].lstrip("-")]
    return list(itertools.takewhile(lambda name: not name.startswith("-"), after))


def in_full(specs: Iterable[OptionSpec]) -> list[str]:
    """Format options in full: name, default, choices if there are few, and the whole text."""
    lines = []
    for spec in specs:
        choices = f" ({', '.join(spec.choices)})" if spec.choices and len(spec.choices) < 8 else ""
        lines.append(f"  --{spec.name} = {spec.default!r}{choices}")
        lines += wrap_lines(spec.help, 6)
    return lines


def in_brief(specs: Iterable[OptionSpec]) -> list[str]:
    """Format options briefly: name, default, and the first sentence of the text."""
    lines = []
    for spec in specs:
        lines.append(f"  --{spec.name} = {spec.default!r}")
        lines += wrap_lines(_SENTENCE_END.split(" ".join(spec.help.split()))[0].rstrip("."), 6)
    return lines


def wrap_lines(text: str, indent: int) -> list[str]:
    """Wrap a text into indented lines."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
