"""The parts, in their order, with the most time that each may take."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.isolation import Outcome
from benchmarks.gpu.settings import Settings

TESTS = "tests"
REFERENCE = "train-sdpa"
DRY_RUN_PATIENCE = 4
TESTS_S = 150
_LINE = re.compile(r"^(?:tests/gpu/)?(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part: its command, its limit, and the package that it needs, by the name under which `machine` has looked for it."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: str | None = None

    def obstacle(self, machine: Mapping[str, Any]) -> str | None:
        """Why the part can't run on that machine, or None."""
        if self.needs is None or machine.get("attentions", {}).get(self.needs):
            return None
        return f"{self.needs} is not installed, or not for this device"


def parts(settings: Settings) -> list[Part]:
    """All parts. Together their limits are longer than the whole may take: what one leaves, the others have.

    A dry run has more patience: it shows that everything runs, on whatever machine.
    """
    found = [
        Part(name="machine", command=_module("machine"), limit_s=40),
        Part(name="checkpoint", command=_module("checkpoint"), limit_s=60),
        Part(name=TESTS, command=_pytest(settings), limit_s=TESTS_S),
        Part(name="load", command=_module("load"), limit_s=95),
        Part(name=REFERENCE, command=_train("sdpa"), limit_s=70),
        Part(name="train-trl", command=_module("train", "train-trl", "trl", "sdpa"), limit_s=70),
        Part(name="memory", command=_module("memory"), limit_s=45),
        Part(name="train-flash_attention_2", command=_train("flash_attention_2"), limit_s=60, needs="flash_attention_2"),
        Part(name="train-flex_attention", command=_train("flex_attention"), limit_s=80, needs="flex_attention"),
    ]
    patience = DRY_RUN_PATIENCE if settings.dry_run else 1
    return [replace(part, limit_s=patience * part.limit_s) for part in found]


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments)


def _train(attention: str) -> tuple[str, ...]:
    return _module("train", f"train-{attention}", "zero_sft", attention)


def _pytest(settings: Settings) -> tuple[str, ...]:
    """What `make test-gpu` runs; in a dry run one test, in a rehearsal on the CPU."""
    report = f"--junit-xml={Path(settings.work) / 'junit.xml'}"
    chosen = ("-k", "samples_of_a_row and sdpa") if settings.dry_run else ()
    devices = f"ZERO_SFT_TEST_DEVICES={'cpu' if settings.dry_run else '1'}"
    files = [f"tests/gpu/test_{name}.py" for name in ("load", "training", "packing")]  # what compiles longest comes last
    options = ["-p", "pytest_timeout", f"--session-timeout={TESTS_S - 20}", "-v", "-v", "-m", "gpu", report, *chosen]
    return ("env", devices, sys.executable, "-m", "pytest", *options, *files)


def tests_of(work: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests: by pytest's own report, or, where it has not come to write one, by what it printed."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    lines: dict[str, str] = {}
    try:
        root = ElementTree.parse(work / "junit.xml").getroot()
    except (OSError, ElementTree.ParseError):
        log = work / f"{TESTS}.log"
        for name, word in _LINE.findall(log.read_text(errors="replace") if log.exists() else ""):
            found["failed" if word == "ERROR" else word.lower()].append(name)
        return {**found, "lines": lines}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        trouble = next((child for kind in ("failure", "error") for child in case.iter(kind)), None)
        skipped = case.find("skipped")
        kind = "failed" if trouble is not None else "skipped" if skipped is not None else "passed"
        found[kind].append(name)
        if trouble is not None:
            lines[name] = "\n".join((trouble.text or "").rstrip().splitlines()[-12:])
        elif skipped is not None:
            lines[name] = skipped.get("message", "")
    return {**found, "lines": lines}


def finished(outcomes: Mapping[str, Outcome], name: str) -> Mapping[str, Any]:
    """A part's results, whole or not; {} where it has none."""
    return outcomes[name].result if name in outcomes else {}
