"""Option types, defaults and help from dataclass fields, and the conversion of values to these types.

The annotation of a field gives the type and its metadata the help, so that command lines, API functions and documentation
share one definition. Values come as text from a command line, as plain data from YAML and JSON, or as Python objects from a
caller; the last are checked but not converted.

YAML 1.1 reads `2e-5` as text, so text is converted where a number is expected. It reads a bare `no` as false, so false becomes
"no" where "no" is a choice (`eval_strategy: no`).
"""

import dataclasses
import difflib
import enum
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.json_text import JsonError, parse_json
from zero_sft.printable import excerpt

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1", "y", "t"), ("false", "no", "off", "0", "n", "f")
NONE_WORDS = ("none", "null")

ANYTHING = frozenset({"boolean", "integer", "number", "text", "list", "mapping", "none"})

_PLAIN = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "text",
    object: "object",
    type(None): "none",
    list: "list",
    dict: "mapping",
}
_IN_WORDS = {
    "boolean": "True or False",
    "integer": "a whole number",
    "number": "a number",
    "text": "text",
    "list": "a list of texts",
    "integers": "whole numbers",
    "mapping": "a mapping (as JSON on the command line)",
    "none": "none",
}
_INTEGER = re.compile(r"[+-]?\d{1,1000}")  # Python converts at most 4,300 digits
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MISFIT = object()

SECRETS = ("token", "use_auth_token", "hub_token", "push_to_hub_token")
"""Options whose values must not appear in messages or logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option: its name, types, choices, default and help."""

    name: str
    group: str = ""
    kinds: frozenset[str] = ANYTHING
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""

    @property
    def expected(self) -> str:
        """The expected type or choices in words, for messages."""
        return " or ".join([*(["one of " + ", ".join(self.choices)] if self.choices else []), *self.expected_besides_choices])

    @property
    def expected_besides_choices(self) -> list[str]:
        """The expected types in words, other than the choices."""
        return [_IN_WORDS[kind] for kind in _IN_WORDS if kind in self.kinds and not (kind == "text" and self.choices)]

    def fit(self, value: Any) -> Any:
        """Convert `value` to the type of this option.

        Raises:
            ArgumentError: the value can't be converted; says what was expected and what was given.
        """
        fitted = self._from_text(value) if isinstance(value, str) else self._from_data(value)
        if fitted is _MISFIT:
            shown = "another value (not shown)" if self.name in SECRETS else f"{value!r}{self._nearest(value)}"
            raise ArgumentError(f"--{self.name} must be {self.expected}; got {shown}", code="arguments.wrong_value")
        return fitted

    def accepts(self, value: Any) -> bool:
        """Return True if a Python object is valid without conversion; the annotation `object` accepts everything."""
        if "object" in self.kinds:
            return True
        if isinstance(value, str):
            return value in self.choices if self.choices else "text" in self.kinds
        return self._from_data(value) is not _MISFIT

    def _from_text(self, text: str) -> Any:
        word = text.lower()
        if "none" in self.kinds and word in NONE_WORDS:
            return None
        if "boolean" in self.kinds and word in (TRUE_WORDS + FALSE_WORDS if "text" not in self.kinds else ("true", "false")):
            return word in TRUE_WORDS
        if "integer" in self.kinds and _INTEGER.fullmatch(text):
            return int(text)
        if "number" in self.kinds and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if ("mapping" in self.kinds and text.startswith("{")) or ("list" in self.kinds and text.startswith("[")):
            return self._from_json(text)
        if self.choices:
            return text if text in self.choices else _MISFIT
        if "text" in self.kinds:
            return text
        return self._from_data([text]) if self.kinds & {"list", "integers"} else _MISFIT

    def _from_json(self, text: str) -> Any:
        try:
            return self._from_data(parse_json(text))
        except JsonError as error:
            raise ArgumentError(
                f"--{self.name} can't be used as JSON: {error.place_and_reason}; got {excerpt(repr(text))}",
                code="arguments.value_not_json",
            ) from error

    def _from_data(self, value: Any) -> Any:
        if value is None:
            return None if "none" in self.kinds else _MISFIT
        if isinstance(value, bool):
            if "boolean" in self.kinds:
                return value
            return "no" if value is False and "no" in self.choices else _MISFIT
        if isinstance(value, int) and "integer" in self.kinds:
            return value
        if isinstance(value, int | float):
            return float(value) if "number" in self.kinds and math.isfinite(value) else _MISFIT
        if isinstance(value, list) and "integers" in self.kinds:
            numbers = [int(item) for item in value if _INTEGER.fullmatch(str(item))]
            return numbers if len(numbers) == len(value) else _MISFIT
        if isinstance(value, list):
            return list(value) if "list" in self.kinds and all(isinstance(item, str) for item in value) else _MISFIT
        if isinstance(value, Mapping):
            return dict(value) if "mapping" in self.kinds else _MISFIT
        return _MISFIT

    def _nearest(self, value: Any) -> str:
        near = difflib.get_close_matches(value, self.choices, n=1) if isinstance(value, str) else []
        return f". Did you mean {near[0]}?" if near else ""


@functools.cache
def specs_of(group: type, name: str = "") -> Mapping[str, OptionSpec]:
    """Return the options that the dataclass `group` declares, in its order; `name` becomes their group name."""
    hints = typing.get_type_hints(group)
    return {field.name: _spec(field, hints[field.name], name) for field in dataclasses.fields(group) if field.init}


def _spec(field: dataclasses.Field, hint: Any, group: str) -> OptionSpec:
    kinds, choices = _kinds(hint)
    choices = tuple(field.metadata.get("choices", ())) or choices
    if "mapping" in kinds and field.name.endswith("_kwargs"):
        kinds -= {"text"}  # meant for JSON text; other text would fail much later
    factory = field.default_factory
    default = factory() if factory is not dataclasses.MISSING else field.default
    return OptionSpec(
        name=field.name,
        group=group,
        kinds=frozenset(kinds),
        choices=choices,
        default=None if default is dataclasses.MISSING else default,
        help=field.metadata.get("help", "").replace("%%", "%"),
    )


def _kinds(hint: Any) -> tuple[set[str], tuple[str, ...]]:
    """Return the kinds of values that an annotation allows, and its choices: `Literal["a"] | None` → ({text, none}, (a,))."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        members = [_kinds(member) for member in arguments]
        return set().union(*(kinds for kinds, _ in members)), tuple(choice for _, choices in members for choice in choices)
    if origin is typing.Literal:
        return {_PLAIN[type(value)] for value in arguments}, tuple(value for value in arguments if isinstance(value, str))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"text"}, tuple(str(member.value) for member in hint)
    if origin is list and arguments == (int,):
        return {"integers"}, ()
    return {_PLAIN[origin or hint]} if (origin or hint) in _PLAIN else set(), ()


def positivity_errors(
    values: Mapping[str, Any], names: Iterable[str], largest: Mapping[str, int] = types.MappingProxyType({})
) -> Iterator[ArgumentError]:
    """Yield an error for each number under these `names` that is not above 0, and at most `largest` or below 2**31."""
    for name in names:
        value = values.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 < number <= largest.get(name, 2**31 - 1):
                limit = f"at most {largest[name]:,}" if name in largest else "below 2**31"
                yield ArgumentError(f"--{name} must be more than 0 and {limit}; got {number}", code="arguments.out_of_range")


def emptiness_errors(values: Mapping[str, Any], names: Iterable[str]) -> Iterator[ArgumentError]:
    """Yield an error for each text under these `names`, or in a list of texts, that is empty."""
    for name in names:
        value = values.get(name)
        if value == "" or (isinstance(value, list) and "" in value):
            yield ArgumentError(f"--{name} is empty: check that its variable is set", code="arguments.empty")
