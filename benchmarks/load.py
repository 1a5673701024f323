"""Load time, traffic and memory, side by side: the bare read of the same bytes, this loader, transformers' own.

    python -m benchmarks.load [--pairs 5] [--ranks 2] [--write docs/benchmarks.md]

A 1.1-billion-parameter Llama with random bf16 weights is made once in a cache folder. The three ways then take turns in
fresh processes (forked after the imports), so that a slow minute of the machine hits all of them; medians are shown, and
ratios of medians of paired runs. All of it runs in a network namespace of its own where that is allowed, so that the
counters of the loopback interface hold this traffic alone.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.runner import run_ranks

WAYS = ("bare read", "sharded", "stock")
SIZES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 128},
}  # fmt: skip
_MARK = "ZERO_SFT_BENCH_NAMESPACE"


def make_checkpoint(folder: Path, size: str) -> Path:
    """A Llama of that size with random bf16 weights, in one file; kept for the next time."""
    if (folder / "complete").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], dtype="bfloat16")).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size="50GB")
    (folder / "complete").touch()
    return folder


def warm(folder: Path) -> int:
    """Bring the weights into the page cache; returns their size in bytes."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while block := file.read(2**24):
                total += len(block)
    return total


def rank_main(way: str, folder: Path, out: Path) -> None:
    """One rank of one run: load in that way, and write down what it took."""
    import torch.distributed as dist

    from benchmarks import probes
    from zero_sft.distributed import World, connect

    world = World.detect()
    connect(world)
    _touch_the_imports()
    action = {"bare read": bare_read}.get(way, load)
    dist.barrier()
    read, sent = probes.bytes_read(), probes.loopback_bytes()
    with probes.PeakMemory() as memory:
        start = time.perf_counter()
        held = action(way, folder, world)
        seconds = time.perf_counter() - start
    dist.barrier()
    report = getattr(held, "load_report", None)
    result = {
        "seconds": seconds,
        "read": probes.bytes_read() - read,
        "loopback": probes.loopback_bytes() - sent,
        "memory": memory.growth,
        "stages": report.stages if report else {},
    }
    (out / f"{world.rank}.json").write_text(json.dumps(result))


def _touch_the_imports() -> None:
    """What every way would import, or transformers build once a process, on first use counts for none."""
    import deepspeed.runtime.zero.stage3
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.llama import modeling_llama  # noqa: F401

    import zero_sft.pretrained  # noqa: F401

    assert deepspeed
    get_checkpoint_conversion_mapping("llama")


def bare_read(way: str, folder: Path, world) -> object:
    """This rank's share of the files' bytes into fresh anonymous memory, nothing else."""
    import mmap

    held = []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        share = -(-size // world.world_size)
        start, stop = world.rank * share, min((world.rank + 1) * share, size)
        memory = mmap.mmap(-1, stop - start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view, position = memoryview(memory), 0
        handle = os.open(path, os.O_RDONLY)
        while position < len(view):
            position += os.preadv(handle, [view[position : position + 2**25]], start + position)
        os.close(handle)
        held.append(memory)
    return held


def load(way: str, folder: Path, world) -> object:
    """Through the public API."""
    from zero_sft import load_model

    return load_model(str(folder), ds_config={"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, loader=way)


def run_once(way: str, folder: Path, ranks: int) -> dict:
    """One run; the slowest rank's seconds, the largest of what ranks read and hold, the traffic of all."""
    with tempfile.TemporaryDirectory() as out:
        run_ranks(ranks, rank_main, {"way": way, "folder": folder, "out": Path(out)}, timeout_s=300)
        results = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]
    worst = {key: max(result[key] for result in results) for key in ("seconds", "read", "loopback", "memory")}
    slowest = max(results, key=lambda result: result["seconds"])
    return {**worst, "stages": slowest["stages"]}


def table(runs: dict[str, list[dict]], share_bytes: int) -> list[str]:
    """Rows of a Markdown table."""
    rows = [
        "| way | seconds, slowest rank: median (min to max) | x bare read | MiB read a rank | share | MiB through loopback "
        "| peak memory a rank over the interpreter, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, results in runs.items():
        seconds = [run["seconds"] for run in results]
        ratios = [run["seconds"] / bare["seconds"] for run, bare in zip(results, runs["bare read"], strict=True)]
        read, loopback, memory = (statistics.median(run[key] for run in results) for key in ("read", "loopback", "memory"))
        rows.append(
            f"| {way} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
            f"| {statistics.median(ratios):.2f} | {read / 2**20:,.0f} | {read / share_bytes:.3f} "
            f"| {loopback / 2**20:,.2f} | {memory / 2**20:,.0f} |"
        )
    speedups = [stock["seconds"] / ours["seconds"] for stock, ours in zip(runs["stock"], runs["sharded"], strict=True)]
    rows += ["", f"Stock takes {statistics.median(speedups):.1f} times as long as the sharded loader (median of pairs)."]
    stages = {name: statistics.median(run["stages"][name] for run in runs["sharded"]) for name in runs["sharded"][0]["stages"]}
    rows.append("Of the sharded load, in seconds: " + ", ".join(f"{name} {s:.3f}" for name, s in stages.items()) + ".")
    return rows


def _in_own_namespace() -> None:
    """Start over inside `unshare --net`, once, where that is permitted."""
    if os.environ.get(_MARK) or not shutil.which("unshare"):
        return
    options = ["--net"] if os.geteuid() == 0 else ["--net", "--map-root-user"]
    if os.spawnvp(os.P_WAIT, "unshare", ["unshare", *options, "true"]) == 0:
        os.environ[_MARK] = "1"
        os.execvp("unshare", ["unshare", *options, sys.executable, "-m", "benchmarks.load", *sys.argv[1:]])


def main() -> None:
    """Run the comparison and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each way (default 5)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "zero_sft" / "bench")
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    _in_own_namespace()
    from benchmarks import probes

    if os.environ.get(_MARK):
        probes.loopback_up()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folder = make_checkpoint(options.cache / options.size, options.size)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for pair in range(options.pairs):
        for way in WAYS:
            nbytes = warm(folder)
            runs[way].append(run_once(way, folder, options.ranks))
            print(f"{pair + 1}/{options.pairs} {way:10} {runs[way][-1]['seconds']:6.2f} s", flush=True)
    title = f"Llama {options.size} in bf16 ({nbytes / 2**20:,.0f} MiB), {options.ranks} CPU ranks, warm page cache"
    lines = [f"## {title}", "", probes.machine(), "", *table(runs, -(-nbytes // options.ranks)), ""]
    print("\n" + "\n".join(lines))
    if options.write:
        options.write.write_text("# Benchmarks\n\nMade by `make bench`.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
