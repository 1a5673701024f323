"""Compare loaders side by side: a bare read of the same bytes, this loader, transformers' loader, and other libraries.

    python -m benchmarks.load [--pairs 11] [--cases "3B" ...] [--write docs/benchmarks.md]

In every round each loader runs once, in new processes (forked after the imports) and in a random order, so that a slow minute
of the machine affects all of them. The tables show medians, and medians of the ratios within rounds. Before each run the page
cache is warmed or emptied, and checked, and free memory is touched once. If permitted, everything runs in a separate network
namespace, so that the counters of the loopback interface contain only this traffic.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import start
from benchmarks.checkpoints import Checkpoint, weight_files
from benchmarks.rivals import RIVALS, available
from benchmarks.ways import OURS, ROOFLINES, STOCK, prepare_cache, rank_main
from testing import probes
from testing.runner import run_ranks

_MARK = "ZERO_SFT_BENCH_NAMESPACE"
_TRIALS = 3  # rounds of the bare reads alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One table of the comparison: a checkpoint, the number of ranks, the page cache's state, and the other libraries."""

    name: str
    checkpoint: Checkpoint
    ranks: int = 2
    warm: bool = True
    rivals: tuple[str, ...] = ()
    starts: bool = False

    @property
    def title(self) -> str:
        """The heading of the table."""
        return f"{self.name}: {self.checkpoint.title}, {self.ranks} CPU ranks, {'warm' if self.warm else 'cold'} page cache"

    @property
    def ways(self) -> tuple[str, ...]:
        """The loaders that are compared, in addition to the bare reads."""
        return (OURS, STOCK, *(name for name in self.rivals if available()[name] is None))


CASES = (
    Case(name="3B", checkpoint=Checkpoint(size="3B"), rivals=tuple(RIVALS)),
    Case(name="1.1B", checkpoint=Checkpoint(size="1.1B"), rivals=tuple(RIVALS), starts=True),
    Case(name="4 ranks", checkpoint=Checkpoint(size="1.1B"), ranks=4, rivals=("torch_dcp",)),
    Case(name="cold", checkpoint=Checkpoint(size="1.1B"), warm=False, rivals=("torch_dcp",)),
    Case(name="many files", checkpoint=Checkpoint(size="1.1B", max_file="100MB"), rivals=("torch_dcp",)),
    Case(name="experts merged", checkpoint=Checkpoint(size="1.2B MoE")),
    Case(name="cast", checkpoint=Checkpoint(size="1.1B", dtype="float32")),
    Case(name="tiny", checkpoint=Checkpoint(size="tiny"), rivals=tuple(RIVALS), starts=True),
)


def run_once(way: str, folder: Path, ranks: int) -> dict:
    """Run one loader once, and return the maximum of each measurement over ranks, the slowest rank's stages, and the spread."""
    with tempfile.TemporaryDirectory() as out:
        run_ranks(ranks, rank_main, {"way": way, "folder": folder, "out": Path(out)}, timeout_s=300)
        results = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]
    keys = ("seconds", "read", "requests", "loopback", "memory", "file_memory", "taken")
    maxima = {key: max(result[key] for result in results) for key in keys}
    slowest = max(results, key=lambda result: result["seconds"])
    fastest = min(result["seconds"] for result in results)
    return {**maxima, "stages": slowest["stages"], "spread": 1 - fastest / maxima["seconds"]}


def run_case(case: Case, cache: Path, pairs: int) -> dict:
    """Run all rounds of a case, and with `case.starts` also measure from process start to a loaded model and to an engine.

    Rounds of only the bare reads come first; the fastest two of them take part in the rounds with the loaders.
    """
    folder = case.checkpoint.make(cache)
    nbytes = sum(path.stat().st_size for path in weight_files(folder))
    trials = _rounds(case, folder, tuple(ROOFLINES), min(pairs, _TRIALS))
    fastest = sorted(trials, key=lambda way: statistics.median(run["seconds"] for run in trials[way]))[:2]
    starts: dict[str, list[start.Seconds]] = {OURS: [], STOCK: []} if case.starts else {}
    runs = _rounds(case, folder, (*fastest, *case.ways), pairs, starts)
    return {
        "title": case.title, "ranks": case.ranks, "nbytes": nbytes, "runs": runs, "starts": starts, "trials": trials,
        "rounds": pairs, "machine": probes.machine(),
    }  # fmt: skip


def _rounds(
    case: Case, folder: Path, ways: tuple[str, ...], count: int, starts: dict[str, list[start.Seconds]] | None = None
) -> dict[str, list[dict]]:
    """Run rounds in which each of `ways` runs once. Append the times from process start for each loader in `starts`."""
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(count):
        for way in random.Random(number).sample(ways, len(ways)):
            prepare_cache(folder, case.warm)
            runs[way].append(run_once(way, folder, case.ranks))
        for way, seconds in (starts or {}).items():
            prepare_cache(folder, case.warm)
            seconds.append(start.run(way, folder, case.ranks))
        seconds_line = ", ".join(f"{way} {runs[way][-1]['seconds']:.2f}" for way in ways)
        print(f"{case.name} {number + 1}/{count}: {seconds_line}", flush=True)
    return runs


_results: dict[str, dict] = {}


def _keep(name: str, result: dict, document: Path | None) -> None:
    """Keep a case's results; also in a JSON file next to the document, so that a single case can be run again."""
    _results[name] = result
    if document:
        path = document.with_suffix(".json")
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**earlier, name: result}, indent=1), encoding="utf-8")


def _kept(document: Path | None) -> list[dict]:
    """Return the results of all cases in order, with those of earlier runs from the JSON file next to the document."""
    results = json.loads(document.with_suffix(".json").read_text(encoding="utf-8")) if document else _results
    return [results[case.name] for case in CASES if case.name in results]


def write_document(path: Path) -> None:
    """Write the tables of all kept results to a Markdown file, and a picture of the loads next to it."""
    from benchmarks import save
    from benchmarks.table import document, draw

    cases, picture = _kept(path), path.with_suffix(".png")
    saving = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("saving", {})
    sections = [save.rows(saving[case.name]) for case in save.CASES if case.name in saving]
    path.write_text(document(cases, picture=picture.name, saving=sections), encoding="utf-8")
    draw(cases, picture)


def _in_own_namespace() -> None:
    """Restart this program inside `unshare --net`, once, if that is permitted."""
    if os.environ.get(_MARK) or not shutil.which("unshare"):
        return
    options = ["--net"] if os.geteuid() == 0 else ["--net", "--map-root-user"]
    if os.spawnvp(os.P_WAIT, "unshare", ["unshare", *options, "true"]) == 0:
        os.environ[_MARK] = "1"
        os.execvp("unshare", ["unshare", *options, sys.executable, "-m", "benchmarks.load", *sys.argv[1:]])


def main() -> None:
    """Run the comparison and print the tables."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--cases", nargs="+", choices=names, default=names[:-1], help="default: all but tiny")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "zero_sft" / "bench")
    parser.add_argument(
        "--write", type=Path, help="write tables to this Markdown file, and a picture and the raw results next to it"
    )
    options = parser.parse_args()
    _in_own_namespace()
    from benchmarks.table import document

    if os.environ.get(_MARK):
        probes.loopback_up()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for case in CASES:
        if case.name in options.cases:
            _keep(case.name, run_case(case, options.cache, options.pairs), options.write)
    if options.write:
        write_document(options.write)
    else:
        print("\n" + document(_kept(None), picture=None))


if __name__ == "__main__":
    main()
