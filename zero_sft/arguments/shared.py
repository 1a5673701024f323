"""Options of the training job that other commands share, with the same names, types, defaults and help."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from zero_sft.arguments.inherited import listed_specifications
from zero_sft.arguments.names import TRANSLATIONS
from zero_sft.options.names import Translation
from zero_sft.options.spec import OptionSpec


def shared_options(names: Sequence[str], **changes: Any) -> list[OptionSpec]:
    """Return the job's options with these names, and apply `changes` (such as another help text) to each."""
    specs = listed_specifications()
    return [dataclasses.replace(specs[name], **changes) for name in names]


def shared_translations(specs: Sequence[OptionSpec]) -> dict[str, Translation]:
    """Return the former names of these options that the job accepts, except those that were switches."""
    names = {spec.name for spec in specs}
    return {old: new for old, new in TRANSLATIONS.items() if new.name in names and not new.values}
