"""Split a command line into names and raw values, for all commands of this package.

Later steps resolve names and convert values, in the same way for a command line and a file. This is not argparse, which reads
`-1e-5` as an option, an arguments file after a flag as the flag's value, and the value of an unknown name as the file. With
workarounds for all of these, nothing would remain for it to do.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.spec import FALSE_WORDS, NONE_WORDS, TRUE_WORDS, OptionSpec

COMMAND_LINE = "the command line"
FILE_SUFFIXES = (".yaml", ".yml", ".json")

_OPTION = re.compile(r"--[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawArgument:
    """One argument as the user gave it; `origin` is "the command line" or the path of the file."""

    name: str
    value: Any
    origin: str


def read_command_line(
    argv: Sequence[str], specs: Mapping[str, OptionSpec], positional: Sequence[str] = ()
) -> tuple[list[RawArgument], Path | None]:
    """Split a command line into arguments and the path of an arguments file, if one is given.

    Forms: `--name value`, `--name=value`, `--name a b c` for a list, `--flag` for True, `--no_flag` for False. Dashes in names
    count as underscores. `specs` has every name that is understood. Other names take one value and are refused later. Words
    without a name are the values of the `positional` options, in their order.

    Raises:
        ArgumentError: a name without its value, or a word that belongs to no name.
    """
    arguments, file, position, unnamed = [], None, 0, list(positional)
    while position < len(argv):
        word = argv[position]
        position += 1
        if not _OPTION.match(word) and unnamed and not word.lower().endswith(FILE_SUFFIXES):
            arguments.append(RawArgument(name=unnamed.pop(0), value=word, origin=COMMAND_LINE))
            continue
        if not _OPTION.match(word):
            file = _as_file(word, file, arguments)
            continue
        name, equals, text = word[2:].partition("=")
        name, value = name.replace("-", "_"), text
        flag = name.removeprefix("no_")
        if not equals and name not in specs and flag in specs and "boolean" in specs[flag].kinds:
            name, value = flag, False
        elif not equals:
            values = _values_of(argv[position:], name, specs.get(name))
            position += len(values)
            value = values[0] if len(values) == 1 else values or True
        arguments.append(RawArgument(name=name, value=value, origin=COMMAND_LINE))
    return arguments, file


def _values_of(rest: Sequence[str], name: str, spec: OptionSpec | None) -> Sequence[str]:
    """Return the words after `--name` that are its values; none for a flag."""
    words = list(itertools.takewhile(lambda word: not _OPTION.match(word), rest))
    if spec is None or not spec.kinds & {"list", "integers"}:
        words = words[:1]
    if spec is None:
        return words
    if spec.kinds <= {"boolean", "none"} and words and words[0].lower() not in TRUE_WORDS + FALSE_WORDS + NONE_WORDS:
        return []
    if not words and "boolean" not in spec.kinds:
        raise ArgumentError(f"--{name} needs a value: {spec.expected}", code="arguments.value_missing")
    return words


def _as_file(word: str, file: Path | None, arguments: list[RawArgument]) -> Path:
    if word.lower().endswith(FILE_SUFFIXES) and file is None:
        return Path(word)
    last = arguments[-1] if arguments else None
    if last and isinstance(last.value, bool) and not word.startswith("-"):
        raise ArgumentError(f"--{last.name} {word}: expected True or False, or no value", code="arguments.not_a_bool")
    after = f" after --{last.name}" if last else ""
    raise ArgumentError(
        f"unexpected word {word!r}{after}: expected --name value, or one file of arguments ({', '.join(FILE_SUFFIXES)}). "
        "A text with spaces needs quotes; a value that begins with -- needs the form --name=value.",
        code="arguments.stray_word",
    )
