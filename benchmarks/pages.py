"""Compare ways to populate the memory that a load reads into: `python -m benchmarks.pages [--rounds 7] [--size 3B]`.

In every round each way loads once, in new processes and in a random order. A run begins with the page cache warm or cold.
Its free memory is either "backed", which means touched just before, or "reclaimed", which a hypervisor has taken back.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Checkpoint, weight_files
from benchmarks.ways import OURS, loader_function, prepare_cache, settle_memory
from testing.runner import run_ranks

_RECLAIMED_AFTER_S = 4.0
_RANKS = 2


def _plain(_: Any) -> int:
    from zero_sft.storage import pages

    return pages._MADV_NOHUGEPAGE


def _huge(_: Any) -> int:
    from zero_sft.storage import pages

    return pages._MADV_HUGEPAGE


def _never_populate(pages: Any, begin: int, end: int, is_complete: bool) -> None:
    """Leave the page faults to the reads."""


def _advise_huge(pages: Any, begin: int, end: int, is_complete: bool) -> None:
    """Ask for huge pages, and leave the page faults to the reads."""
    pages._advise(begin, end, _huge(pages))


WAYS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "plain, by page faults": {"_populate": _never_populate},
    "huge, by page faults": {"_populate": _advise_huge},
    "plain, populated": {"_choose_page_size": _plain},
    "huge, populated": {"_choose_page_size": _huge},
    "the faster one, populated": {},
}


def load(way: str, folder: Path, out: Path, backed: bool) -> None:
    """Load as one rank, and write its seconds. Every rank; communicates."""
    import torch.distributed as dist

    from zero_sft.cluster.world import World
    from zero_sft.storage.pages import Pages
    from zero_sft.zero.process_group import connect

    for name, function in WAYS[way].items():
        setattr(Pages, name, function)
    world = connect(World.detect())
    action = loader_function(OURS)
    if not backed:
        time.sleep(_RECLAIMED_AFTER_S)
    elif world.rank == 0:
        settle_memory(3 * sum(path.stat().st_size for path in weight_files(folder)) // 2)
    dist.barrier()
    start = time.perf_counter()
    loaded = action(folder, world)
    seconds = time.perf_counter() - start
    dist.barrier()
    del loaded
    (out / f"{world.rank}.json").write_text(json.dumps(seconds))


def run(way: str, folder: Path, *, warm: bool, backed: bool) -> float:
    """Load once, and return the slowest rank's seconds."""
    prepare_cache(folder, warm)
    with tempfile.TemporaryDirectory() as out:
        run_ranks(_RANKS, load, {"way": way, "folder": folder, "out": Path(out), "backed": backed}, timeout_s=300)
        return max(json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(_RANKS))


def main() -> None:
    """Measure, and print one table for each state of page cache and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="3B")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "zero_sft" / "bench")
    options = parser.parse_args()
    folder = Checkpoint(size=options.size).make(options.cache)
    for warm, backed in itertools.product((True, False), repeat=2):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in random.Random(number).sample(list(WAYS), len(WAYS)):
                seconds[way].append(run(way, folder, warm=warm, backed=backed))
        reference = seconds["the faster one, populated"]
        sys.stdout.write(
            f"\n{options.size}, page cache {'warm' if warm else 'cold'}, free memory {'backed' if backed else 'reclaimed'}\n\n"
            "| pages | seconds: median (min to max) | x the faster one |\n| --- | --- | ---: |\n"
        )
        for way, times in seconds.items():
            ratio = statistics.median(time_s / reference_s for time_s, reference_s in zip(times, reference, strict=True))
            sys.stdout.write(
                f"| {way} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {ratio:.2f} |\n"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
