"""Help of a command: which topic a command line asks for, and options as text."""

import contextlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence

from zero_sft.cluster.world import World
from zero_sft.errors import ConfigError
from zero_sft.options.spec import OptionSpec

WIDTH = 118

_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)\.\s+(?=[A-Z`])")


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(word in ("-h", "--help") or word.startswith("--help=") for word in argv)


def write_help(argv: Sequence[str], help_text: Callable[[str | None], str | None]) -> int:
    """Write what a command line asks for to stdout, on rank 0; returns the exit status, 2 for a name that nothing matches."""
    text, status = "", 0
    for topic in _topics(argv) or [None]:
        part = help_text(topic)
        if part is None:
            part, status = f"No argument has {topic!r} in its name or text. `--help` lists all arguments.\n", 2
        text += part
    with contextlib.suppress(ConfigError):  # variables of a launcher that can't be used: say it all the same
        if not World.detect().is_main:
            return status
    sys.stdout.write(text)
    return status


def _topics(argv: Sequence[str]) -> list[str]:
    """The names that are asked for: `--help=NAME`, or the words after `--help`; one `--NAME` there counts, if it is alone."""
    position = next(n for n, word in enumerate(argv) if word in ("-h", "--help") or word.startswith("--help="))
    word, after = argv[position], list(argv[position + 1 :])
    if word.startswith("--help="):
        return [word.removeprefix("--help=")]
    if len(after) == 1:
        return [after[0].lstrip("-")]
    names = []
    for name in after:
        if name.startswith("-"):
            break
        names.append(name)
    return names


def at_length(specs: Iterable[OptionSpec]) -> list[str]:
    """Name and default, the choices if they are few, and the whole text."""
    lines = []
    for spec in specs:
        choices = f" ({', '.join(spec.choices)})" if spec.choices and len(spec.choices) < 8 else ""
        lines.append(f"  --{spec.name} = {spec.default!r}{choices}")
        lines += wrapped(spec.help, 6)
    return lines


def in_short(specs: Iterable[OptionSpec]) -> list[str]:
    """Name and default, and the first sentence of the text, whole."""
    lines = []
    for spec in specs:
        lines.append(f"  --{spec.name} = {spec.default!r}")
        lines += wrapped(_SENTENCE_END.split(" ".join(spec.help.split()))[0].rstrip("."), 6)
    return lines


def wrapped(text: str, indent: int) -> list[str]:
    """Lines of a text, indented."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
