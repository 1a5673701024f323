"""Kill ranks and try hostile files for long: `python -m tests.faults --kills 50 --cases 100000 --write docs/reliability.md`."""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.fuzz import TARGETS
from tests.faults.kills import Kills, kill_at_random

MARK = "<!-- written by make soak -->\n"


def fuzz(cases: int) -> list[str]:
    """Try that many files in all; return a row of a table for each target."""
    rows = []
    for target in TARGETS:
        began, share = time.monotonic(), cases // len(TARGETS)
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.fuzz", str(share), target],
            capture_output=True, text=True, timeout=7200, check=False, env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{target}: a fault\n{done.stderr[-6000:]}")
        names = ", ".join(f"`{name}`" for name in TARGETS[target].changed)
        rows.append(f"| {names} | {share:,} | {time.monotonic() - began:.0f} |")
        sys.stdout.write(rows[-1] + "\n")
        sys.stdout.flush()
    return rows


def page(kills: Kills, cases: int, rows: list[str]) -> str:
    """Return the part of the page that is measured."""
    codes = Counter(kills.codes)
    return "\n".join([
        f"Measured on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, on 2 CPU cores.",
        "",
        "### Killed ranks",
        "",
        "| | |",
        "| --- | ---: |",
        f"| kills | {len(kills.seconds)} |",
        f"| seconds until the other processes had ended: median | {statistics.median(kills.seconds):.1f} |",
        f"| worst | {max(kills.seconds):.1f} |",
        *(f"| message `{code}` | {count} |" for code, count in codes.most_common()),
        "",
        "Each run that was killed and started again ended with the weights and losses of one without kills, bit for bit.",
        "",
        "### Hostile files",
        "",
        f"{cases // len(TARGETS) * len(TARGETS):,} changed files. None ended a process, hung, took more than 4 GiB, or had a "
        "file opened elsewhere.",
        "",
        "| file | cases | seconds |",
        "| --- | ---: | ---: |",
        *rows,
        "",
    ])  # fmt: skip


def main() -> None:
    """Run both, and write the figures into a page below its mark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = fuzz(options.cases)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        kills = kill_at_random(Path(folder), options.kills, options.seed)
    sys.stdout.write(kills.summary() + "\n")
    text = page(kills, options.cases, rows)
    if options.write:
        before = options.write.read_text(encoding="utf-8").partition(MARK)[0]
        options.write.write_text(before + MARK + "\n" + text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
