"""Names of options that have changed, and names that are refused; raw arguments turned into values under today's names."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.command_line import COMMAND_LINE, RawArgument, read_command_line
from zero_sft.options.file import read_file
from zero_sft.options.spec import SECRETS, OptionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """Today's name, and the value for each boolean where the old one was a switch; None there means it asked for nothing."""

    name: str
    values: Mapping[bool, str | None] | None = None
    below: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a name is refused, and the values of it that pass because they ask for what happens anyway."""

    reason: str
    passing: tuple[Any, ...] = (None, False, "", "no", "none", "false")


@dataclass(frozen=True, kw_only=True)
class OptionNames:
    """Every name that a command understands.

    Attributes:
        specs: today's names.
        translations: former names, and names of other libraries.
        refusals: names without a meaning here, and what to use instead.
        removed: names of former releases that change nothing any more, and why.
        ignored: names that launchers add.
    """

    specs: Mapping[str, OptionSpec]
    translations: Mapping[str, Translation] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @functools.cached_property
    def readable(self) -> Mapping[str, OptionSpec]:
        """Every name, with what its value may be."""
        known = dict(self.specs)
        for name, translation in self.translations.items():
            kinds = frozenset({"boolean"}) if translation.values else self.specs[translation.name].kinds
            choices = () if translation.values else self.specs[translation.name].choices
            known[name] = OptionSpec(name=name, kinds=kinds, choices=choices)
        for name in self.ignored | self.removed.keys() | {name for name in self.refusals if name not in known}:
            known[name] = OptionSpec(name=name)
        return known

    def read(self, argv: Iterable[str]) -> "ReadValues":
        """Read a command line (without the program's name), and the file that it may name. Does not communicate.

        Raises:
            ArgumentError: a command line or a file that can't be split into names and values.
        """
        raw, file = read_command_line(list(argv), self.readable)
        result = ReadValues()
        for source in (read_file(file) if file else [], raw):  # the command line last: it wins
            self._resolve(source, result)
        return result

    def _resolve(self, source: Iterable[RawArgument], result: "ReadValues") -> None:
        """Add the values of one source under today's names."""
        used_names: dict[str, str] = {}  # today's name → the name that was used
        for raw in source:
            if raw.name in self.removed:
                result.notes.append(f"--{raw.name} has no effect any more: {self.removed[raw.name]}. Leave it out.")
                continue
            try:
                resolved = self._resolve_one(raw)
            except ArgumentError as error:
                result.problems.append(ArgumentError(f"{error} (from {raw.origin})", code=error.code))
                continue
            if resolved is None:
                continue
            name, value = resolved
            used = used_names.setdefault(name, raw.name)
            if used != raw.name and result.values[name] != value:
                result.problems.append(
                    ArgumentError(
                        f"--{used}{_shown(name, result.values[name])} and --{raw.name}{_shown(name, value)} contradict each "
                        f"other: both set {name}. Give one (from {raw.origin})",
                        code="arguments.contradiction",
                    )
                )
            if name != raw.name:
                result.notes.append(f"--{raw.name} is --{name} today: taken as --{name}{_shown(name, value)}")
            result.values[name] = value

    def _resolve_one(self, raw: RawArgument) -> tuple[str, Any] | None:
        """Today's name and the fitted value of one argument, or None where it asks for nothing."""
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
    """What a command line and its file say.

    Attributes:
        values: by today's names, each of its option's type.
        problems: what is wrong with single arguments.
        notes: lines for the log, such as one for each translated name.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[ArgumentError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require_usable(self, problems: Iterable[ArgumentError] = ()) -> None:
        """Raise one `ArgumentError` that lists what is wrong with the arguments, and `problems`."""
        found = [*self.problems, *problems]
        if found:
            raise ArgumentError.listing(found, "the arguments can't be used:", code="arguments.unusable")


def _shown(name: str, value: Any) -> str:
    """A value for the log, but for what must not be in one."""
    return "" if name in SECRETS else f" {value}"


def _secret(raw: RawArgument, value: str) -> str:
    """A token without the line end of a block of text. HTTP libraries quote one with white space in their errors."""
    if raw.origin == COMMAND_LINE:
        raise ArgumentError(
            f"--{raw.name} on a command line is no secret: process lists show it, and the launcher has logged it. "
            "Revoke it, and set HF_TOKEN in the environment, run `hf auth login` once, or put `token:` into a file of "
            "arguments",
            code="arguments.secret_on_command_line",
        )
    token = value.strip()
    if not token.isascii() or any(character.isspace() or not character.isprintable() for character in token):
        raise ArgumentError(
            f"--{raw.name} has white space or other characters that no token has (it is not shown). Copy it again.",
            code="arguments.bad_token",
        )
    return token
