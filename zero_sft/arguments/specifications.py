"""Specify all arguments of the job, with a shipped table of the inherited ones, so that `--help` imports no heavy library.

`make arguments` writes the table for the installed versions. The table is used only with the versions that it was written for;
a test compares it with the libraries. Parsing the libraries' source instead of importing it would miss fields that inheritance
and decorators declare.
"""

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zero_sft.adapters.options import LoraOptions
from zero_sft.arguments.groups import DataArguments, ModelArguments
from zero_sft.arguments.names import TRANSLATIONS
from zero_sft.options.resolve import Translation
from zero_sft.options.spec import OptionSpec, specs_of

TABLE = Path(__file__).with_name("inherited.json")
LIBRARIES = ("transformers", "trl")

MODEL, DATA, LORA, TRAINING = "model", "data", "lora", "training"
"""Names of the groups of arguments."""

ALWAYS_SET = ("output_dir", "overwrite_output_dir", "model_max_length", "optim", "deepspeed", "resume_from_checkpoint")
"""Arguments of the training group that `parse` always sets, and that the overview of `--help` shows in full.

`parse` also sets `trust_remote_code`, to the value of the group Model.
"""


@functools.cache
def specifications() -> Mapping[str, OptionSpec]:
    """Return the specifications of all arguments by name, in the order of `--help`. Imports TRL."""
    from zero_sft.arguments.training import TrainingArguments

    return _all_groups(specs_of(TrainingArguments, TRAINING))


def specifications_from_table() -> Mapping[str, OptionSpec]:
    """Return the same as `specifications`, without TRL if the table matches the installed versions. For `--help`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["versions"] != installed_versions():
        return specifications()
    return _all_groups({row["name"]: _spec(row) for row in table["arguments"]})


def shared_options(names: Sequence[str], **changes: Any) -> list[OptionSpec]:
    """Return the job's options with these names for another command, and apply `changes` (such as another help text)."""
    specs = specifications_from_table()
    return [replace(specs[name], **changes) for name in names]


def shared_translations(specs: Sequence[OptionSpec]) -> dict[str, Translation]:
    """Return the former names of these options that the job accepts, except those that were switches."""
    names = {spec.name for spec in specs}
    return {old: new for old, new in TRANSLATIONS.items() if new.name in names and not new.values}


def installed_versions() -> dict[str, str]:
    """Return the installed versions of the libraries from which the training group inherits."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def table_text() -> str:
    """Return the table for the installed versions. Imports TRL."""
    from zero_sft.arguments.training import TrainingArguments

    rows = [asdict(spec) for spec in specs_of(TrainingArguments, TRAINING).values()]
    table = {"versions": installed_versions(), "arguments": rows}
    return json.dumps(table, indent=1, ensure_ascii=False, default=sorted) + "\n"  # sorted: JSON has no sets


def write_table() -> None:
    """Write the table for the installed versions. Called by `make arguments`."""
    TABLE.write_text(table_text(), encoding="utf-8")


def _spec(row: Mapping[str, Any]) -> OptionSpec:
    return OptionSpec(**{**row, "kinds": frozenset(row["kinds"]), "choices": tuple(row["choices"])})


def _all_groups(inherited: Mapping[str, OptionSpec]) -> Mapping[str, OptionSpec]:
    """Put this project's groups first. SFTConfig also has `trust_remote_code`, which the group Model owns."""
    own = {**specs_of(ModelArguments, MODEL), **specs_of(DataArguments, DATA), **specs_of(LoraOptions, LORA)}
    return MappingProxyType({**own, **inherited, **own})
