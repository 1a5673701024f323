"""Keep what a run does in its log folder while it goes on: `run.json` and `metrics.jsonl`. Rank 0.

`run.json` has an entry for each start of the run: arguments, versions, host, data. `metrics.jsonl` has a line for each logged
step, evaluation and checkpoint, with the time in seconds since 1970. A run that is resumed adds to both, so a step that was
trained twice has two lines, of which the last one counts. Importing this module imports transformers.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zero_sft.cluster.starts import job_name, start_number
from zero_sft.job.loss_plot import plot_loss

logger = logging.getLogger("zero_sft.train")

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"

REDRAW_SECONDS = 60.0
"""Least time between two drawings of the loss curve while the run goes on."""

_LIBRARIES = ("zero_sft", "torch", "deepspeed", "transformers", "trl", "accelerate")


class RunFolder:
    """The log folder of a run. An error while it is written is logged once, and does not end the run.

    Args:
        is_resumed: the files that are there are of this run.
    """

    def __init__(self, folder: Path, *, is_resumed: bool) -> None:
        self.folder, self._has_failed = folder, False
        with self._reported():
            folder.mkdir(parents=True, exist_ok=True)
            if not is_resumed:
                for name in (RUN_FILE, METRICS_FILE):
                    (folder / name).unlink(missing_ok=True)
            else:
                _end_last_line(folder / METRICS_FILE)

    def begin(self, arguments: Mapping[str, Any], ranks: int, data: Mapping[str, Any], step: int) -> None:
        """Add an entry for this start.

        Args:
            data: names and digests of the training data.
            step: the step from which the run goes on; 0 at its beginning.
        """
        entry = {
            "began": _now(),
            "start": start_number(),
            "job": job_name(),
            "from_step": step,
            "host": socket.gethostname(),
            "ranks": ranks,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _LIBRARIES},
            "git_commit": _git_commit(),
            "data": data,
            "arguments": arguments,
        }
        self._write_starts([*self.starts(), entry])
        self.add({"event": "start", "step": step})

    def end(self, **values: Any) -> None:
        """Complete the entry of this start."""
        starts = self.starts()
        if starts:
            self._write_starts([*starts[:-1], {**starts[-1], "ended": _now(), **values}])

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        line = json.dumps({"time": round(time.time(), 3), **values}, default=_plain)
        with self._reported(), (self.folder / METRICS_FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """Return the entries of `run.json`."""
        return read_starts(self.folder)

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        with self._reported():
            unfinished = self.folder / f".{RUN_FILE}.new"
            unfinished.write_text(
                json.dumps({"starts": starts}, indent=2, ensure_ascii=False, default=_plain),
                encoding="utf-8",
                errors="backslashreplace",  # half of a surrogate pair, in a path that is not UTF-8
            )
            unfinished.replace(self.folder / RUN_FILE)

    @contextlib.contextmanager
    def _reported(self) -> Any:
        try:
            yield
        except (OSError, ValueError, RecursionError) as error:
            if not self._has_failed:
                logger.warning("the logs can't be written to %s: %s. The run goes on.", self.folder, error)
            self._has_failed = True


def _end_last_line(path: Path) -> None:
    """Begin a new line after one that was half written, as a kill or a full disk leaves it."""
    if path.is_file() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a log folder's `run.json`; empty for a file that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        starts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["starts"]
        return [start for start in starts if isinstance(start, dict)]
    return []


class WriteMetrics(TrainerCallback):
    """Write metrics to a run's folder, and draw the loss curve now and then. Rank 0.

    Args:
        title: that of the loss curve.
    """

    def __init__(self, run: RunFolder, title: str) -> None:
        self._run, self._title = run, title
        self._drawn = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write what is logged."""
        if logs and state.is_world_process_zero:
            self._run.add({"step": state.global_step, **logs})
            if time.monotonic() - self._drawn > REDRAW_SECONDS:
                with contextlib.suppress(OSError):
                    plot_loss(state.log_history, self._run.folder / "loss.png", self._title)
                self._drawn = time.monotonic()


def _plain(value: Any) -> Any:
    """Return a JSON value for a number of numpy or torch, and text for anything else."""
    with contextlib.suppress(Exception):
        number = value.item()
        return number if not isinstance(number, float) or math.isfinite(number) else str(number)
    return str(value)


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _git_commit() -> str | None:
    """Return the commit of the working directory, with "+" if files were changed since; None without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
