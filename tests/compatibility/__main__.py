"""Try every set-up with every method: `python -m tests.compatibility [--write FILE] [--only WORDS]`."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from testing.runner import run_ranks
from tests.adapters.test_attach import save_calm
from tests.compatibility.document import document
from tests.compatibility.experts import outcomes as trained_experts
from tests.compatibility.experts import types
from tests.compatibility.methods import METHODS
from tests.compatibility.setups import SETUPS
from tests.compatibility.trials import outcome
from tests.library.test_trainers import TRAINERS, make, train


def tried_trainers(folder: Path) -> dict[str, str]:
    """Return what came of each trainer of other libraries."""
    make(folder / "trainers")
    results = {}
    for name, run in TRAINERS.items():
        try:
            run_ranks(2, train, {"folder": folder / "trainers", "run": run, "out": folder / "out"})
            results[name] = "passed"
        except AssertionError as error:
            results[name] = f"failed: {error}"
    return results


def main() -> int:
    """Print a line for each; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="", help="a part of the names of set-ups")
    options = parser.parse_args()
    outcomes, failed = {}, False
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        folder = save_calm("llama", Path(name) / "llama")
        for setup_name, setup in SETUPS.items():
            if setup.refused or setup.gpu_only or options.only not in setup_name:
                continue
            for method in METHODS:
                started = time.monotonic()
                try:
                    results = outcome(folder, setup_name, method)
                except AssertionError as error:
                    results = {"ranks": str(error)}
                others = {caller: result for caller, result in results.items() if result != "passed"}
                failed = failed or any(not result.startswith("refused") for result in others.values())
                outcomes[setup_name, method] = {
                    caller: "failed" if result not in ("passed",) and not result.startswith("refused") else result
                    for caller, result in results.items()
                }
                sys.stdout.write(f"{setup_name}, {method}: {others or 'passed'} ({time.monotonic() - started:.0f} s)\n")
                sys.stdout.flush()
        trainers = {} if options.only else tried_trainers(Path(name))
        experts = trained_experts(types() if not options.only else [], Path(name))
    for name, result in {**trainers, **experts}.items():
        if result not in ("equal", "passed"):
            failed = True
            sys.stdout.write(f"{name}: {result}\n")
    if options.write:
        options.write.write_text(document(outcomes, trainers, experts), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
