"""Run all parts in order and write a document with their results. See the package's docstring."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.document import document
from benchmarks.gpu.isolation import Outcome, run_part
from benchmarks.gpu.parts import DRY_RUN_TIME_FACTOR, TESTS, parts, tests_of
from benchmarks.gpu.settings import Settings

SECONDS = 430
"""The time limit of all parts together, so that the benchmark and its environment's set-up take less than 8 minutes."""


def main() -> int:
    """Run the benchmark. Return 1 if a part failed or ran out of time, else 0."""
    options = _parser().parse_args()
    work = Path(options.work or tempfile.mkdtemp(prefix="zero_sft-gpu-"))
    work.mkdir(parents=True, exist_ok=True)
    tiny = {"size": "tiny", "length": 128, "steps": 2, "rounds": 1, "dry_run": True} if options.dry_run else {}
    settings = Settings(work=str(work), **tiny)
    settings.write()
    try:
        seconds = options.seconds * (DRY_RUN_TIME_FACTOR if options.dry_run else 1)
        outcomes = _run_all(settings, seconds, options.only, options.write)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    print(document(settings, outcomes))
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes.values()))


def _run_all(settings: Settings, seconds: float, only: list[str] | None, write: Path | None) -> dict[str, Outcome]:
    """Run the parts in order, and write the document after each, so that it exists however the benchmark ends."""
    outcomes: dict[str, Outcome] = {}
    deadline, work = time.monotonic() + seconds, Path(settings.work)
    for part in parts(settings):
        if only and part.name not in only:
            continue
        obstacle = part.obstacle(outcomes["machine"].result if "machine" in outcomes else {})
        if obstacle:
            skipped = {"seconds": 0.0, "limit_s": 0.0, "result": {}, "tail": obstacle}
            outcomes[part.name] = Outcome(name=part.name, status="skipped", **skipped)
        else:
            outcome = run_part(part.name, part.command, min(part.limit_s, deadline - time.monotonic()), work)
            if part.name == TESTS:
                outcome.result.update(tests_of(work))  # type: ignore[attr-defined]
            outcomes[part.name] = outcome
        print(f"{part.name}: {outcomes[part.name].status}, {outcomes[part.name].seconds:.0f} s", flush=True)
        if write:
            _write(write, settings, outcomes)
    return outcomes


def _write(path: Path, settings: Settings, outcomes: dict[str, Outcome]) -> None:
    path.write_text(document(settings, outcomes), encoding="utf-8")
    raw_results = {name: outcome.to_dict() for name, outcome in outcomes.items()}
    path.with_suffix(".json").write_text(json.dumps(raw_results, indent=1), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Benchmark one GPU in some minutes.")
    parser.add_argument("--write", type=Path, help="write the document here, and the raw results next to it as JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time limit of all parts together (default {SECONDS})")
    parser.add_argument("--dry_run", action="store_true", help="every part that a CPU can do, with a tiny model")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts, with the other parts' files in --work")
    parser.add_argument("--work", help="a folder for the checkpoint and the logs, which is kept (default: a temporary folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
