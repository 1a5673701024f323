"""The document of what was tried, made of the outcomes."""

from collections.abc import Mapping
from pathlib import Path

import deepspeed
import peft
import torch
import transformers

from tests.compatibility.cells import CALLERS
from tests.compatibility.methods import METHODS
from tests.compatibility.setups import SETUPS

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
Outcome = Mapping[str, str]
"""What came of each caller, by name."""

_START = f"""# Compatibility

Written by `make compatibility`, which tries each set-up of DeepSpeed ZeRO-3 with each method of training: a tiny Llama on CPU
ranks, with transformers {transformers.__version__}, DeepSpeed {deepspeed.__version__}, PEFT {peft.__version__} and torch \
{torch.__version__.partition("+")[0]}. [Configs](configs.md) explains the keys.

## What is tried

| caller | has to |
| --- | --- |
"""


def document(outcomes: Mapping[tuple[str, str], Outcome], trainers: Mapping[str, str], experts: Mapping[str, str]) -> str:
    """Return the document of the outcomes by set-up and method, by trainer, and by mixture of experts."""
    lines = [f"| {name} | {what} |" for name, what in CALLERS.items()]
    lines += ["", "## Set-ups and methods", "", "*Passed*: every caller, before and after the engine's start.", ""]
    lines += ["| set-up | " + " | ".join(METHODS) + " |", "| --- |" + " --- |" * len(METHODS)]
    for name, setup in SETUPS.items():
        if not setup.refused and not setup.gpu_only:
            lines.append(f"| {name} | " + " | ".join(_cell(outcomes.get((name, method))) for method in METHODS) + " |")
    lines += ["", "## GPU only", "", "Not tried on CPU ranks.", "", "| set-up | reason |", "| --- | --- |"]
    lines += [f"| {name} | {setup.gpu_only} |" for name, setup in SETUPS.items() if setup.gpu_only]
    lines += ["", "## Refused", "", "By `load_model` and at the start of the job, before a weight is read.", ""]
    lines += ["| set-up | code of the error |", "| --- | --- |"]
    lines += [f"| {name} | `{setup.refused}` |" for name, setup in SETUPS.items() if setup.refused]
    lines += ["", "## Trainers", "", "Three steps end at the values of the same after a stock load, bit for bit.", ""]
    lines += ["| trainer | |", "| --- | --- |", *(f"| {name} | {result} |" for name, result in trainers.items())]
    equal = sorted(name for name, result in experts.items() if result == "equal")
    lines += [
        "", "## Mixtures of experts", "",
        f"Two steps (doge: one) on 2 ranks, of which each uses a few experts that the other does not use: {len(equal)} of "
        f"{len(experts)} types end at the values of unsharded training. The experts are computed in a loop over those that are "
        "in use, the harder case.", "", ", ".join(equal) + ".",
    ]  # fmt: skip
    lines += [f"- {name}: {result}" for name, result in experts.items() if result != "equal"]
    return _START + "\n".join(lines) + "\n"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not tried"
    others = [f"{caller} {result}" for caller, result in outcome.items() if result != "passed"]
    return "; ".join(others) or "passed"


def names_in(text: str) -> set[str]:
    """Return the names of set-ups, methods and callers in a document: first cells of its rows, and the methods' row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    heads = {"caller", "set-up", "trainer", "---"}
    methods = next((row[1:] for row in rows if row[0] == "set-up" and len(row) > 2), [])
    return {row[0] for row in rows} - heads | set(methods)
