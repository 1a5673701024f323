"""Resolve raw arguments to values under current option names: translate old names and refuse unusable ones."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.command_line import COMMAND_LINE, RawArgument, read_command_line
from zero_sft.options.file import read_file
from zero_sft.options.spec import SECRETS, OptionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """Translation of an old option name.

    Attributes:
        name: the current name.
        values: if the old option was a switch, its new value for True and False; None if the switch asked for nothing.
        below: the bound that a number given under the old name must stay below.
    """

    name: str
    values: Mapping[bool, str | None] | None = None
    below: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Reason for refusing an option, and values that pass because they ask for what happens anyway."""

    reason: str
    passing: tuple[Any, ...] = (None, False, "", "no", "none", "false")


@dataclass(frozen=True, kw_only=True)
class OptionNames:
    """All option names that a command understands.

    Attributes:
        specs: current names.
        translations: former names, and names that other libraries use.
        refusals: names that have no meaning here, with what to use instead.
        removed: names of former releases that no longer have an effect, with the reason.
        ignored: names that launchers add.
        positional: names whose values may be given without the name, in this order.
    """

    specs: Mapping[str, OptionSpec]
    translations: Mapping[str, Translation] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    positional: tuple[str, ...] = ()

    @functools.cached_property
    def readable(self) -> Mapping[str, OptionSpec]:
        """All names, with the values that each may take."""
        specs = dict(self.specs)
        for name, translation in self.translations.items():
            switch = OptionSpec(name=name, kinds=frozenset({"boolean"}))
            specs[name] = switch if translation.values else replace(self.specs[translation.name], name=name)
        for name in self.ignored | self.removed.keys() | {name for name in self.refusals if name not in specs}:
            specs[name] = OptionSpec(name=name)
        return specs

    def read(self, argv: Iterable[str]) -> "ReadValues":
        """Read a command line (without the program's name) and the arguments file that it may name. Does not communicate.

        Raises:
            ArgumentError: a command line or a file that can't be split into names and values.
        """
        raw, file = read_command_line(list(argv), self.readable, self.positional)
        from_file, from_command_line = self._resolve(read_file(file) if file else []), self._resolve(raw)
        return ReadValues(
            values={**from_file.values, **from_command_line.values},
            problems=[*from_file.problems, *from_command_line.problems],
            notes=[*from_file.notes, *from_command_line.notes],
            unusable=from_file.unusable | from_command_line.unusable,
        )

    def _resolve(self, source: Iterable[RawArgument]) -> "ReadValues":
        """Convert the arguments of a file or a command line to values under current names."""
        result = ReadValues(values={}, problems=[], notes=[])
        given_names: dict[str, str] = {}  # current name → the name that the user gave
        for raw in source:
            if raw.name in self.removed:
                result.notes.append(f"--{raw.name} has no effect any more: {self.removed[raw.name]}. Leave it out.")
                continue
            try:
                resolved = self._resolve_argument(raw)
            except ArgumentError as error:
                result.problems.append(ArgumentError(f"{error} (from {raw.origin})", code=error.code))
                result.unusable.add(self.translations[raw.name].name if raw.name in self.translations else raw.name)
                continue
            if resolved is None:
                continue
            name, value = resolved
            given = given_names.setdefault(name, raw.name)
            if given != raw.name and result.values[name] != value:
                result.problems.append(
                    ArgumentError(
                        f"--{given}{_shown(name, result.values[name])} and --{raw.name}{_shown(name, value)} contradict each "
                        f"other: both set {name}. Give one (from {raw.origin})",
                        code="arguments.contradiction",
                    )
                )
            if name != raw.name:
                result.notes.append(f"--{raw.name} is --{name} today: taken as --{name}{_shown(name, value)}")
            result.values[name] = value
        return result

    def _resolve_argument(self, raw: RawArgument) -> tuple[str, Any] | None:
        """Return the current name and the converted value of one argument, or None if it asks for nothing."""
        if raw.name in self.ignored:
            return None
        if raw.name not in self.readable:
            near = difflib.get_close_matches(raw.name, self.readable, n=1)
            hint = f"Did you mean --{near[0]}?" if near else "--help lists all names."
            raise ArgumentError(f"unknown argument --{raw.name}. {hint}", code="arguments.unknown")
        value: Any = self.readable[raw.name].fit(raw.value)
        if raw.name in SECRETS and isinstance(value, str):
            value = _secret(raw, value)
        if raw.name in self.refusals:
            refusal = self.refusals[raw.name]
            if (value.lower() if isinstance(value, str) else value) in refusal.passing:
                return None
            raise ArgumentError(f"--{raw.name} has no meaning in this job: {refusal.reason}", code="arguments.no_meaning")
        if raw.name not in self.translations:
            return raw.name, value
        translation = self.translations[raw.name]
        if translation.below is not None and not 0 <= value < translation.below:
            raise ArgumentError(
                f"--{raw.name} must be at least 0 and below {translation.below:g}; got {value}", code="arguments.out_of_range"
            )
        if translation.values:
            value = translation.values[value]
            if value is None:
                return None
        return translation.name, self.specs[translation.name].fit(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadValues:
    """Values read from a command line and its arguments file.

    Attributes:
        values: by current name, each converted to the option's type.
        problems: errors in single arguments.
        notes: lines for the log, such as one per translated name.
        unusable: the current names of the options that were given a value they can't take, which `problems` explain.
    """

    values: dict[str, Any]
    problems: list[ArgumentError]
    notes: list[str]
    unusable: set[str] = field(default_factory=set)

    def require_usable(self, problems: Iterable[ArgumentError] = ()) -> None:
        """Raise one `ArgumentError` that lists all errors in the arguments, including `problems`."""
        all_problems = [*self.problems, *problems]
        if all_problems:
            raise ArgumentError.listing(all_problems, "the arguments can't be used:", code="arguments.unusable")


def _shown(name: str, value: Any) -> str:
    """Format a value for the log, or hide it if it is a secret."""
    return "" if name in SECRETS else f" {value}"


def _secret(raw: RawArgument, value: str) -> str:
    """Return a token without surrounding white space, and refuse an invalid one, which HTTP libraries quote in errors."""
    if raw.origin == COMMAND_LINE:
        raise ArgumentError(
            f"--{raw.name} on a command line is not secret: process lists show it, and the launcher has logged it. "
            "Revoke it, then set HF_TOKEN in the environment, run `hf auth login` once, or put `token:` into a file of "
            "arguments",
            code="arguments.secret_on_command_line",
        )
    token = value.strip()
    if not token.isascii() or any(character.isspace() or not character.isprintable() for character in token):
        raise ArgumentError(
            f"--{raw.name} has white space or other characters that a token can't have (it is not shown). Copy it again.",
            code="arguments.bad_token",
        )
    return token
