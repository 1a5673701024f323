"""Where arguments come from: the words of a command line, and one YAML or JSON file.

Both give names and raw values; what the names mean and whether the values fit is decided afterwards, alike for both.
argparse was left out: it takes abbreviated names, ends the process by itself on every rank, and can't tell an argument that
was given from a default.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options import FALSE_WORDS, TRUE_WORDS, Spec

COMMAND_LINE = "the command line"
FILE_SUFFIXES = (".yaml", ".yml", ".json")

_OPTION = re.compile(r"--[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One argument as it was given: `origin` is "the command line" or the file's path."""

    name: str
    value: Any
    origin: str


def read_command_line(argv: Sequence[str], specs: Mapping[str, Spec]) -> tuple[list[Given], Path | None]:
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
            given.append(Given(name=name, value=text, origin=COMMAND_LINE))
            continue
        values = _values_of(argv[position:], specs.get(name), name, specs)
        position += len(values)
        given.append(_given(name, values, specs))
    return given, file


def _values_of(rest: Sequence[str], spec: Spec | None, name: str, specs: Mapping[str, Spec]) -> list[str]:
    """The words after `--name` that are its values."""
    values = []
    for word in rest:
        if _OPTION.match(word):
            break
        values.append(word)
    if spec is None:
        return values[: 0 if _negated(name, specs) else 1]
    if "list" in spec.kinds:
        return values
    if spec.kinds <= {"boolean", "none"} and values and values[0].lower() not in TRUE_WORDS + FALSE_WORDS + ("none", "null"):
        return []
    return values[:1]


def _given(name: str, values: list[str], specs: Mapping[str, Spec]) -> Given:
    spec = specs.get(name)
    if spec is None and not values and _negated(name, specs):
        return Given(name=_negated(name, specs), value=False, origin=COMMAND_LINE)
    if not values:
        if spec is not None and "boolean" not in spec.kinds:
            raise ArgumentError(f"--{name} needs a value: {spec.expected}", code="arguments.value_missing")
        return Given(name=name, value=True, origin=COMMAND_LINE)
    return Given(name=name, value=values[0] if len(values) == 1 else values, origin=COMMAND_LINE)


def _negated(name: str, specs: Mapping[str, Spec]) -> str:
    """The flag that `no_flag` switches off, or "" if there is none."""
    flag = name.removeprefix("no_")
    return flag if flag != name and flag in specs and "boolean" in specs[flag].kinds else ""


def _as_file(word: str, file: Path | None, given: list[Given]) -> Path:
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


def read_file(path: Path) -> list[Given]:
    """The arguments in a YAML or JSON file: a mapping from names to values.

    Raises:
        ArgumentError: no such file, not YAML or JSON, not a mapping, or a name given twice.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ArgumentError(f"can't read the arguments file {path}: {reason}", code="arguments.file_unreadable") from error
    pairs = _json_pairs(path, text) if path.suffix.lower() == ".json" else _yaml_pairs(path, text)
    names = [name for name, _ in pairs]
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            problem = "is given twice" if isinstance(name, str) else "is not a name"
            raise ArgumentError(
                f"{path}: {name!r} {problem}. Write each argument once, as `name: value`.", code="arguments.file_bad_key"
            )
    return [Given(name=name.replace("-", "_"), value=value, origin=str(path)) for name, value in pairs]


def _json_pairs(path: Path, text: str) -> list[tuple[Any, Any]]:
    depth_first: list[list[tuple[Any, Any]]] = []

    def remember(pairs: list[tuple[Any, Any]]) -> dict:
        depth_first.append(pairs)  # the outermost mapping comes last
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=remember)
    except ValueError as error:
        raise ArgumentError(f"{path} is not JSON: {error}", code="arguments.file_not_json") from error
    if not isinstance(content, dict):
        raise ArgumentError(
            f"{path}: expected one JSON object of names and values, got {type(content).__name__}",
            code="arguments.file_not_an_object",
        )
    return depth_first[-1]


def _yaml_pairs(path: Path, text: str) -> list[tuple[Any, Any]]:
    import yaml

    loader = _plain_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ArgumentError(
                f"{path}: expected lines of `name: value`, got {type(loader.construct_document(node)).__name__}",
                code="arguments.file_not_an_object",
            )
        if any(key.tag == _MERGE for key, _ in node.value):
            raise ArgumentError(
                f"{path}: merge keys (<<) are not read. Write the arguments out.", code="arguments.file_merge_key"
            )
        return [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True)) for key, value in node.value
        ]
    except yaml.YAMLError as error:
        # PyYAML's own text quotes the line, which may hold a token.
        raise ArgumentError(f"{path} is not YAML: {_without_quotes(error)}", code="arguments.file_not_yaml") from None
    finally:
        loader.dispose()


_MERGE = "tag:yaml.org,2002:merge"


@functools.cache
def _plain_loader() -> Any:
    """PyYAML's safe loader, without two number formats of YAML 1.1: 010 is not 8, and 1:30 is not 90, but text."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Reads numbers as a command line does."""

        def construct_number(self, node: Any) -> Any:
            """A number, or the text where YAML 1.1 would read it to another base."""
            text = self.construct_scalar(node)
            if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
                return text
            return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    for kind in ("int", "float"):
        PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)
    return PlainLoader


def _without_quotes(error: Any) -> str:
    """What is wrong and where, without anything that the file holds."""
    problem = re.sub(r"(['\"])(?!<).{6,}?\1", "...", str(getattr(error, "problem", None) or "it can't be read"))
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
