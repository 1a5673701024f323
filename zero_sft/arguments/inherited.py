"""Shipped table of the training group's arguments, so that `--help` does not import TRL, transformers and torch.

`make arguments` writes the table for the installed versions. The table is used only with the versions that it was written for;
a test compares it with the libraries. Left out: parsing the libraries' source without importing it, because inheritance and
decorators also declare fields.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zero_sft.arguments.groups import DataArguments, ModelArguments
from zero_sft.options.spec import OptionSpec, specs_of

TABLE = Path(__file__).with_name("inherited.json")
LIBRARIES = ("transformers", "trl")

MODEL, DATA, TRAINING = "model", "data", "training"


def listed_specifications() -> Mapping[str, OptionSpec]:
    """Return the same as `parse.specifications`, from the table if it matches the installed versions. For `--help`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["versions"] != installed_versions():
        from zero_sft.arguments.parse import specifications

        return specifications()
    own = own_specifications()
    inherited = {row["name"]: _spec(row) for row in table["arguments"]}
    return {**own, **{name: spec for name, spec in inherited.items() if name not in own}}


def own_specifications() -> dict[str, OptionSpec]:
    """Return the arguments of the groups Model and Data."""
    return {**specs_of(ModelArguments, MODEL), **specs_of(DataArguments, DATA)}


def installed_versions() -> dict[str, str]:
    """Return the installed versions of the libraries from which the training group inherits."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def table_text() -> str:
    """Return the table for the installed versions. Imports TRL."""
    from zero_sft.arguments.training import TrainingArguments

    rows = [_row(spec) for spec in specs_of(TrainingArguments, TRAINING).values()]
    return json.dumps({"versions": installed_versions(), "arguments": rows}, indent=1, ensure_ascii=False) + "\n"


def _row(spec: OptionSpec) -> dict[str, Any]:
    return {**asdict(spec), "kinds": sorted(spec.kinds), "choices": list(spec.choices)}


def _spec(row: Mapping[str, Any]) -> OptionSpec:
    return OptionSpec(**{**row, "kinds": frozenset(row["kinds"]), "choices": tuple(row["choices"])})


def write_table() -> None:
    """Write the table for the installed versions. Called by `make arguments`."""
    TABLE.write_text(table_text(), encoding="utf-8")
