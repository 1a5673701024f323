"""A command that reads its options from a command line and an arguments file, and prints their help."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from zero_sft.errors import ArgumentError, ZeroSftError
from zero_sft.options.format_help import in_full, wants_help, write_help
from zero_sft.options.resolve import OptionNames, Translation
from zero_sft.options.spec import OptionSpec, emptiness_errors, positivity_errors


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that runs in one process.

    Attributes:
        program: the words that start the command.
        groups: the options by the heading under which `--help` shows them.
        required: the options that the user must give, by name, with what to give.
        positive: names of options whose numbers must be above 0.
        largest: the largest number that some of these options take.
        translations: former names, and names that other libraries use.
        positional: names of options whose values may be given without the name, in this order.
    """

    program: str
    description: str
    groups: Mapping[str, Sequence[OptionSpec]]
    required: Mapping[str, str] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    largest: Mapping[str, int] = field(default_factory=dict)
    translations: Mapping[str, Translation] = field(default_factory=dict)
    positional: tuple[str, ...] = ()

    @property
    def specs(self) -> dict[str, OptionSpec]:
        """All options by name."""
        return {spec.name: spec for group in self.groups.values() for spec in group}

    def read(self, argv: Sequence[str]) -> tuple[SimpleNamespace, list[str]]:
        """Read a command line, and return the value of every option (or its default) and lines for the log.

        Raises:
            ArgumentError: lists everything that is wrong.
        """
        specs = self.specs
        read = OptionNames(specs=specs, translations=self.translations, positional=self.positional).read(argv)
        missing = [
            ArgumentError(f"--{name} is required: give {what}", code="arguments.required")
            for name, what in self.required.items()
            if read.values.get(name) is None and name not in read.unusable
        ]
        empty = emptiness_errors(read.values, self.required)
        read.require_usable([*missing, *empty, *positivity_errors(read.values, self.positive, self.largest)])
        return SimpleNamespace(**{name: read.values.get(name, spec.default) for name, spec in specs.items()}), read.notes

    def run(self, argv: Sequence[str] | None, action: Callable[[SimpleNamespace, list[str]], None]) -> int:
        """Answer `--help`, or pass what `read` returns to `action`. Return the exit status: 2 for an error, in one line."""
        argv = sys.argv[1:] if argv is None else argv
        if wants_help(argv):
            return write_help(argv, self.help_text)
        try:
            action(*self.read(argv))
        except ZeroSftError as error:
            sys.stderr.write(f"error: {error.with_code}\n")
            return 2
        return 0

    def help_text(self, topic: str | None = None) -> str | None:
        """Return the help of all options, or of those whose names contain `topic`; None if there are none."""
        word = "" if topic in (None, "all") else str(topic).replace("-", "_").lower()
        usage = " ".join([self.program, *map(str.upper, self.positional), "[arguments.yaml] [--name value] ..."])
        parts = [] if word else [f"{self.description}\n\n    {usage}\n"]
        for title, group in self.groups.items():
            matching = [spec for spec in group if word in spec.name]
            if matching:
                parts += [f"{title}:", *in_full(matching), ""]
        former = [f"  --{name}  is  --{translation.name}" for name, translation in self.translations.items() if word in name]
        if former:
            parts += ["Former names that are still accepted:", *former, ""]
        return "\n".join(parts) if parts else None
