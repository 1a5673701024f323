"""A command whose options are declared once: its command line, a file of arguments, and its help."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from zero_sft.errors import ArgumentError
from zero_sft.options.help import at_length
from zero_sft.options.names import OptionNames, Translation
from zero_sft.options.spec import OptionSpec, not_positive


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, run by one process.

    Attributes:
        program: the words that start it.
        groups: its options by the title under which `--help` shows them.
        required: names that have to be given.
        positive: names whose numbers must be above 0.
        translations: former names, and names of other libraries.
    """

    program: str
    description: str
    groups: Mapping[str, Sequence[OptionSpec]]
    required: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    translations: Mapping[str, Translation] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, OptionSpec]:
        """Every option by its name."""
        return {spec.name: spec for group in self.groups.values() for spec in group}

    def read(self, argv: Sequence[str]) -> tuple[SimpleNamespace, list[str]]:
        """Read a command line. Returns every option's value, by default its default, and lines for the log.

        Raises:
            ArgumentError: listing everything that is wrong with it.
        """
        specs = self.specs
        read = OptionNames(specs=specs, translations=self.translations).read(argv)
        absent = [
            ArgumentError(f"--{name} is required: {specs[name].expected}", code="arguments.required")
            for name in self.required
            if name not in read.values
        ]
        read.require_usable([*absent, *not_positive(read.values, self.positive)])
        return SimpleNamespace(**{name: read.values.get(name, spec.default) for name, spec in specs.items()}), read.notes

    def help_text(self, topic: str | None = None) -> str | None:
        """Return the help of all options, or of those that have a word in their names; None where none has."""
        word = "" if topic in (None, "all") else str(topic).replace("-", "_").lower()
        parts = [] if word else [f"{self.description}\n\n    {self.program} [arguments.yaml] [--name value] ...\n"]
        for title, group in self.groups.items():
            found = [spec for spec in group if word in spec.name]
            if found:
                parts += [f"{title}:", *at_length(found), ""]
        former = [f"  --{name}  is  --{translation.name}" for name, translation in self.translations.items() if word in name]
        if former:
            parts += ["Names that have changed, and are understood:", *former, ""]
        return "\n".join(parts) if parts else None
