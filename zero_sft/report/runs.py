"""Read what a run has written to its log folder, whether it has ended or not. Nothing in it is trusted."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError

Points = Sequence[tuple[float, float]]
"""Pairs of a step and a value, in order of the steps."""

_LARGEST = 1e100
"""Larger numbers, infinity and NaN are left out: no metric is as large."""

_MOST_BYTES = 2**30
"""Larger files are left out: the log of a million steps has a quarter of it."""

_SERIES = ("loss", "eval_loss", "learning_rate", "grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The logs of a run.

    Attributes:
        folder: the run's output folder.
        series: points by the name of a metric; of a step that was trained twice, the last value.
        rate: tokens per second of all ranks, by step.
        starts: the entries of `run.json`.
        events: the lines of the metrics with an event (a start, a checkpoint), in order of time.
        spans: of each start that the metrics know, the first and the last time, in seconds since 1970.
        load: `load_report.json`; empty if it is not there.
        answers: `answers.json`.
    """

    folder: Path
    series: Mapping[str, Points]
    rate: Points
    starts: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    spans: Sequence[tuple[float, float]]
    load: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]


def read_run(folder: Path) -> Run:
    """Read the logs of the run with this output folder.

    Raises:
        ArgumentError: there are none.
    """
    logs = folder / "logs"
    lines = _metrics(logs / "metrics.jsonl")
    starts = [start for start in _list(_json(logs / "run.json"), "starts") if isinstance(start, dict)]
    if not lines and not starts:
        raise ArgumentError(
            f"{folder} has no logs of a run (logs/run.json, logs/metrics.jsonl). Name a run's --output_dir.",
            code="arguments.no_run",
        )
    answers = _json(logs / "answers.json")
    load = _json(logs / "load_report.json")
    return Run(
        folder=folder,
        series={name: points for name in _SERIES if (points := _points(lines, name))},
        rate=_rate(lines),
        starts=starts,
        events=[line for line in lines if isinstance(line.get("event"), str)],
        spans=_spans(lines),
        load=load if isinstance(load, dict) else {},
        answers=[answer for answer in answers if isinstance(answer, dict)] if isinstance(answers, list) else [],
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are objects with a time and a step; the last one may be half written."""
    lines = []
    if not _is_usable(path):
        return []
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and _is_number(line.get("time")) and _is_number(line.get("step")):
                    lines.append(line)
    return lines


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    values = {line["step"]: float(line[name]) for line in lines if _is_number(line.get(name))}
    return sorted(values.items())


def _spans(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for line in lines:
        if line.get("event") == "start":
            spans.append((line["time"], line["time"]))
        elif spans:
            spans[-1] = (spans[-1][0], max(spans[-1][1], line["time"]))
    return spans


def _rate(lines: Sequence[Mapping[str, Any]]) -> Points:
    """Return tokens per second between two logged steps of one start. Pure."""
    values: dict[float, float] = {}
    before: Mapping[str, Any] | None = None
    for line in lines:
        if "event" in line:
            before = None if line["event"] == "start" else before
        elif _is_number(line.get("num_tokens")) and "loss" in line:
            if before is not None and line["time"] > before["time"] and line["num_tokens"] > before["num_tokens"]:
                values[line["step"]] = (line["num_tokens"] - before["num_tokens"]) / (line["time"] - before["time"])
            before = line
    return sorted(values.items())


def _json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8")) if _is_usable(path) else None
    return None


def _is_usable(path: Path) -> bool:
    """Return whether a path is a file of a reasonable size: neither a pipe, which never ends, nor a device."""
    with contextlib.suppress(OSError):
        return path.is_file() and path.stat().st_size <= _MOST_BYTES
    return False


def _list(content: Any, key: str) -> list[Any]:
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
