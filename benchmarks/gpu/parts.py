"""The parts of the benchmark in order, with their time limits."""

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
DRY_RUN_TIME_FACTOR = 4
TESTS_S = 150
_LINE = re.compile(r"^(?:tests/gpu/)?(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part's command, its time limit, and the attention implementation that it needs, as the part `machine` names it."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: str | None = None

    def obstacle(self, machine: Mapping[str, Any]) -> str | None:
        """Return the reason why the part can't run on this machine, or None if it can. `machine`: the result of that part."""
        if self.needs is None or machine.get("attentions", {}).get(self.needs):
            return None
        return f"{self.needs} is not installed, or does not support this device"


def parts(settings: Settings) -> list[Part]:
    """Return all parts in order.

    The sum of their limits exceeds the limit of all parts together, since parts that end early leave time for the others. A dry
    run has longer limits, since it shows on any machine that everything runs.
    """
    all_parts = [
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
    factor = DRY_RUN_TIME_FACTOR if settings.dry_run else 1
    return [replace(part, limit_s=factor * part.limit_s) for part in all_parts]


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments)


def _train(attention: str) -> tuple[str, ...]:
    return _module("train", f"train-{attention}", "zero_sft", attention)


def _pytest(settings: Settings) -> tuple[str, ...]:
    """Return the command of `make test-gpu`; in a dry run it runs a single test on the CPU."""
    report = f"--junit-xml={Path(settings.work) / 'junit.xml'}"
    selection = ("-k", "samples_of_a_row and sdpa") if settings.dry_run else ()
    devices = f"ZERO_SFT_TEST_DEVICES={'cpu' if settings.dry_run else '1'}"
    files = [f"tests/gpu/test_{name}.py" for name in ("load", "training", "packing")]  # the longest compilation comes last
    options = ["-p", "pytest_timeout", f"--session-timeout={TESTS_S - 20}", "-v", "-v", "-m", "gpu", report, *selection]
    return ("env", devices, sys.executable, "-m", "pytest", *options, *files)


def tests_of(work: Path) -> dict[str, Any]:
    """Return the passed, failed and skipped tests from pytest's report, or from its log if pytest did not write a report."""
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    lines: dict[str, str] = {}
    try:
        root = ElementTree.parse(work / "junit.xml").getroot()
    except (OSError, ElementTree.ParseError):
        log = work / f"{TESTS}.log"
        for name, word in _LINE.findall(log.read_text(errors="replace") if log.exists() else ""):
            names["failed" if word == "ERROR" else word.lower()].append(name)
        return {**names, "lines": lines}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failure = next((child for kind in ("failure", "error") for child in case.iter(kind)), None)
        skipped = case.find("skipped")
        kind = "failed" if failure is not None else "skipped" if skipped is not None else "passed"
        names[kind].append(name)
        if failure is not None:
            lines[name] = "\n".join((failure.text or "").rstrip().splitlines()[-12:])
        elif skipped is not None:
            lines[name] = skipped.get("message", "")
    return {**names, "lines": lines}


def result_of(outcomes: Mapping[str, Outcome], name: str) -> Mapping[str, Any]:
    """Return a part's results, which may be incomplete; {} if it has none."""
    return outcomes[name].result if name in outcomes else {}
