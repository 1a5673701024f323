"""Split the words of a command line into names and raw values; the same for all commands of this package.

What the names mean and whether the values fit is decided afterwards, alike for a command line and a file. argparse was left
out. It takes `-1e-5` for an option, a file of arguments after a flag for the flag's value, and the value of an unknown name for
the file; with all of that worked around, nothing is left for it to do.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.spec import FALSE_WORDS, TRUE_WORDS, OptionSpec

COMMAND_LINE = "the command line"
FILE_SUFFIXES = (".yaml", ".yml", ".json")

_OPTION = re.compile(r"--[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawArgument:
    """One argument as it was given: `origin` is "the command line" or the file's path."""

    name: str
    value: Any
    origin: str


def read_command_line(argv: Sequence[str], specs: Mapping[str, OptionSpec]) -> tuple[list[RawArgument], Path | None]:
    """Split the words of a command line into arguments and the path of a file with more of them, if there is one.

    `--name value`, `--name=value`, `--name a b c` where a list may stand, `--flag` for True, `--no_flag` for False. Dashes in
    names count as underscores. `specs` holds every name that is understood; others take one value, to be refused by name.

    Raises:
        ArgumentError: a name without its value, or a word that belongs to nothing.
    """
    given, file, position = [], None, 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not _OPTION.match(word):
            file = _as_file(word, file, given)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            given.append(RawArgument(name=name, value=text, origin=COMMAND_LINE))
            continue
        values = _values_of(argv[position:], specs.get(name), name, specs)
        position += len(values)
        given.append(_given(name, values, specs))
    return given, file


def _values_of(rest: Sequence[str], spec: OptionSpec | None, name: str, specs: Mapping[str, OptionSpec]) -> list[str]:
    """The words after `--name` that are its values."""
    values = []
    for word in rest:
        if _OPTION.match(word):
            break
        values.append(word)
    if spec is None:
        return values[: 0 if _negated(name, specs) else 1]
    if spec.kinds & {"list", "integers"}:
        return values
    if spec.kinds <= {"boolean", "none"} and values and values[0].lower() not in TRUE_WORDS + FALSE_WORDS + ("none", "null"):
        return []
    return values[:1]


def _given(name: str, values: list[str], specs: Mapping[str, OptionSpec]) -> RawArgument:
    spec = specs.get(name)
    if spec is None and not values and _negated(name, specs):
        return RawArgument(name=_negated(name, specs), value=False, origin=COMMAND_LINE)
    if not values:
        if spec is not None and "boolean" not in spec.kinds:
            raise ArgumentError(f"--{name} needs a value: {spec.expected}", code="arguments.value_missing")
        return RawArgument(name=name, value=True, origin=COMMAND_LINE)
    return RawArgument(name=name, value=values[0] if len(values) == 1 else values, origin=COMMAND_LINE)


def _negated(name: str, specs: Mapping[str, OptionSpec]) -> str:
    """The flag that `no_flag` switches off, or "" if there is none."""
    flag = name.removeprefix("no_")
    return flag if flag != name and flag in specs and "boolean" in specs[flag].kinds else ""


def _as_file(word: str, file: Path | None, given: list[RawArgument]) -> Path:
    if word.lower().endswith(FILE_SUFFIXES) and file is None:
        return Path(word)
    if given and isinstance(given[-1].value, bool) and not word.startswith("-"):
        raise ArgumentError(
            f"--{given[-1].name} {word}: expected True or False, or nothing after it", code="arguments.not_a_bool"
        )
    after = f" after --{given[-1].name}" if given else ""
    raise ArgumentError(
        f"can't tell what {word!r}{after} is: expected --name value, or one file of arguments ({', '.join(FILE_SUFFIXES)}). "
        "A text with spaces needs quotes; a value that begins with -- needs the form --name=value.",
        code="arguments.stray_word",
    )
