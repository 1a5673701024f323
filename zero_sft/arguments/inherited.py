"""The training group's arguments as a shipped table, so that `--help` need not import TRL, transformers and torch.

`make arguments` writes the table for the installed versions; it is read only where the installed versions are those that it
was written for. A test compares it with the libraries.
Left out: reading the libraries' source without importing it, since fields are also declared by inheritance and by decorators.
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
    """What `parse.specifications` returns, read from the table where it is of the installed versions. For `--help`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["versions"] != installed_versions():
        from zero_sft.arguments.parse import specifications

        return specifications()
    own = own_specifications()
    inherited = {row["name"]: _spec(row) for row in table["arguments"]}
    return {**own, **{name: spec for name, spec in inherited.items() if name not in own}}


def own_specifications() -> dict[str, OptionSpec]:
    """The arguments of the groups Model and Data."""
    return {**specs_of(ModelArguments, MODEL), **specs_of(DataArguments, DATA)}


def installed_versions() -> dict[str, str]:
    """The installed releases of the libraries that the training group inherits from."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def table_text() -> str:
    """The table for the installed versions. Imports TRL."""
    from zero_sft.arguments.training import TrainingArguments

    rows = [_row(spec) for spec in specs_of(TrainingArguments, TRAINING).values()]
    return json.dumps({"versions": installed_versions(), "arguments": rows}, indent=1, ensure_ascii=False) + "\n"


def _row(spec: OptionSpec) -> dict[str, Any]:
    return {**asdict(spec), "kinds": sorted(spec.kinds), "choices": list(spec.choices)}


def _spec(row: Mapping[str, Any]) -> OptionSpec:
    return OptionSpec(**{**row, "kinds": frozenset(row["kinds"]), "choices": tuple(row["choices"])})


def write_table() -> None:
    """Write the table for the installed versions; for contributors."""
    TABLE.write_text(table_text(), encoding="utf-8")
