"""Run a part in separate processes with a time limit, so that its failure does not affect the other parts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL_LINES = 25
_GRACE_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a part.

    Attributes:
        status: "done", "failed", "out of time" or "skipped".
        result: the results that the part has saved, which may be incomplete.
        tail: the last lines of its output, or the reason why it was skipped.
    """

    name: str
    status: str
    seconds: float
    limit_s: float
    result: Mapping[str, Any]
    tail: str

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome for the JSON file."""
        return asdict(self)


def run_part(name: str, command: Sequence[str], limit_s: float, work: Path) -> Outcome:
    """Run `command` for at most `limit_s` seconds. Its output goes to `<work>/<name>.log`, its results to `<name>.json`."""
    log, results = work / f"{name}.log", work / f"{name}.json"
    results.unlink(missing_ok=True)
    started = time.monotonic()
    if limit_s < 1:
        return Outcome(name=name, status="skipped", seconds=0, limit_s=0, result={}, tail="no time was left")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | environment(work),
        )  # fmt: skip
        try:
            status = "done" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _end(process)
    try:
        result = json.loads(results.read_text())
    except (OSError, ValueError):
        result = {}
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return Outcome(
        name=name, status=status, seconds=time.monotonic() - started, limit_s=limit_s, result=result,
        tail="" if status == "done" else f"exit status {process.returncode}\n{tail}",
    )  # fmt: skip


def environment(work: Path) -> dict[str, str]:
    """Return a part's environment variables: a launcher's for one rank, no network, and the ninja of this environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "datasets"),
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "ZERO_SFT_BENCH_WORK": str(work), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip


def _end(process: subprocess.Popen) -> None:
    """End a part's process group: first with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait(_GRACE_S)
