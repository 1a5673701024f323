"""Compare ways to save a run's checkpoint, to resume from it and to export it: this project's, DeepSpeed's, and bare writes.

    python -m benchmarks.save [--rounds 5] [--cases "1.1B" ...] [--write docs/benchmarks.md]

The ranks make an engine once and take a step, so that the optimizer has its state. In each round every way saves that state
once, in a random order, until its files are synced; then they are removed. The bare write is what the disk gives: each rank
writes as many bytes as its part of a checkpoint has, from memory, and syncs them. Seconds are those of the slowest rank.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Checkpoint
from testing import probes
from testing.runner import run_ranks

BARE = "bare write"
WAITS = "zero_sft, training waits"
GOES_ON = "zero_sft, training goes on"
BLOCKED = "of these, training waited"
COPY = "the copy alone"
DEEPSPEED = "DeepSpeed: save_checkpoint, save_16bit_model, sync"
RESUME, RESUME_DEEPSPEED = "zero_sft: resume", "DeepSpeed: load_checkpoint"
EXPORT, EXPORT_DEEPSPEED, EXPORT_FP32 = "zero_sft.export", "zero_to_fp32.py", "zero_sft.export --save_dtype float32"

RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and whether the host has memory for a copy of its state."""

    name: str
    size: str
    copies: bool


CASES = (
    Case(name="1.1B", size="1.1B", copies=False),
    Case(name="0.4B", size="0.4B", copies=True),
    Case(name="tiny", size="tiny", copies=True),
)


def rank_main(folder: Path, work: Path, out: Path, case: Mapping[str, Any], rounds: int) -> None:
    """One rank of a case: save in all ways, and write the seconds to `out`."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from zero_sft import load_model
    from zero_sft.checkpoint.manifest import read_manifest
    from zero_sft.cluster.world import World
    from zero_sft.saving import checkpoint_writer, export_layout, weight_files
    from zero_sft.saving.checkpoint_reader import restore_optimizer
    from zero_sft.saving.checkpoint_saver import CheckpointSaver, SaveReport
    from zero_sft.saving.folder import sync
    from zero_sft.zero import optimizer_state
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    ds = {
        "zero_optimization": {"stage": 3, "sub_group_size": 10**8, "reduce_bucket_size": 10**7},
        "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
    }  # fmt: skip
    model = load_model(str(folder), ds_config=ds)
    engine = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())[0]
    ids = torch.arange(2).view(1, 2)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.zero_grad()
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 5 * 10**9, world)
    reports: list[SaveReport] = []
    savers = {
        save_async: CheckpointSaver(
            world, save_async=save_async, on_error="raise", on_saved=lambda _, report: reports.append(report)
        )
        for save_async in (False, True)
    }
    progress = checkpoint_writer.Progress(step=1, samples=2, loss=None, dtype="bfloat16")

    def save(save_async: bool) -> None:
        savers[save_async].save(engine, tensors, work / "checkpoint-1", layout, dict, progress)
        while save_async and not reports:
            time.sleep(0.5)  # a short step
            savers[True].poll()

    def waits() -> dict[str, float]:
        reports.clear()
        save(False)
        return {}

    def goes_on() -> dict[str, float]:
        reports.clear()
        save(True)
        return {BLOCKED: reports[0].blocked_seconds}

    def theirs() -> dict[str, float]:
        engine.save_checkpoint(str(work / "deepspeed"), tag="global_step1")
        engine.save_16bit_model(str(work / "deepspeed"))
        dist.barrier()
        for path in (work / "deepspeed").rglob("*") if world.is_main else ():
            sync(path)
        return {}

    nbytes = -(-layout.nbytes // world.world_size) + _state_nbytes(engine)
    block = memoryview(os.urandom(2**24))

    def bare() -> dict[str, float]:
        handle = os.open(work / f"bare-{world.rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        left = nbytes
        while left:
            left -= os.write(handle, block[: min(left, len(block))])
        os.fsync(handle)
        os.close(handle)
        return {}

    ways: dict[str, Callable[[], dict[str, float]]] = {BARE: bare, WAITS: waits, DEEPSPEED: theirs}
    if case["copies"]:
        ways[GOES_ON] = goes_on
        goes_on()  # allocates the memory for the copy
    seconds: dict[str, list[float]] = {}

    def copy() -> dict[str, float]:
        memory = savers[True]._memory
        assert memory is not None
        memory.take(weight_files.weight_parts(tensors, is_main=world.is_main), optimizer_state.parameter_states(engine))
        return {}

    def timed(name: str, action: Callable[[], dict[str, float]]) -> None:
        if world.is_main:
            _empty(work)
            os.sync()
        dist.barrier()
        began = time.monotonic()
        more = action()
        for key, value in {name: time.monotonic() - began, **more}.items():
            slowest = torch.tensor(value)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds.setdefault(key, []).append(float(slowest))

    for number in range(rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            timed(name, ways[name])
        if case["copies"]:
            timed(COPY, copy)
        if world.is_main:
            print(
                f"{number + 1}/{rounds}: " + ", ".join(f"{name} {times[-1]:.1f}" for name, times in seconds.items()), flush=True
            )
    peak = probes.PeakMemory()
    timed(WAITS, waits)
    with peak:
        save(False)
    grown = peak.growth
    seconds[WAITS].pop()
    folder = work / "checkpoint-1"
    for _ in range(min(rounds, 3)):
        dist.barrier()
        engine.optimizer.optimizer.state.clear()  # as in a new engine
        began = time.monotonic()
        restore_optimizer(engine, folder, read_manifest(folder), world)
        seconds.setdefault(RESUME, []).append(time.monotonic() - began)
    theirs()
    for _ in range(min(rounds, 3) if case["copies"] else 0):  # it loads the whole state next to the engine's
        dist.barrier()
        began = time.monotonic()
        engine.load_checkpoint(str(work / "deepspeed"), load_module_strict=True)
        seconds.setdefault(RESUME_DEEPSPEED, []).append(time.monotonic() - began)
    if world.is_main:
        result = {"seconds": seconds, "nbytes": read_manifest(folder).nbytes, "memory": grown}
        (out / "result.json").write_text(json.dumps(result))
    engine.destroy()


def _state_nbytes(engine: Any) -> int:
    from zero_sft.zero import optimizer_state

    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer_state.parameter_states(engine)
        for tensor in state.tensors.values()
    )


def _empty(work: Path) -> None:
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _exports(work: Path, model: Path, rounds: int) -> dict[str, list[float]]:
    """Time the export of the checkpoints that the ranks have left, each in a new process."""
    checkpoint, deepspeed = work / "checkpoint-1", work / "deepspeed"
    ours = [sys.executable, "-m", "zero_sft.export", str(checkpoint), str(work / "out"), "--model_name_or_path", str(model)]
    commands = {
        EXPORT: ours,
        EXPORT_FP32: [*ours, "--save_dtype", "float32"],
        EXPORT_DEEPSPEED: [sys.executable, str(deepspeed / "zero_to_fp32.py"), str(deepspeed), str(work / "out")],
    }
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in random.Random(number).sample(list(commands), len(commands)):
            shutil.rmtree(work / "out", ignore_errors=True)
            os.sync()
            began = time.monotonic()
            subprocess.run(commands[name], check=True, capture_output=True, timeout=900)
            os.sync()
            seconds.setdefault(name, []).append(time.monotonic() - began)
    return seconds


def run_case(case: Case, cache: Path, rounds: int) -> dict[str, Any]:
    """Run all rounds of a case."""
    folder = Checkpoint(size=case.size).make(cache)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work, out = Path(name) / "work", Path(name)
        work.mkdir()
        given = {"folder": folder, "work": work, "out": out, "case": {"copies": case.copies}, "rounds": rounds}
        run_ranks(RANKS, rank_main, given, timeout_s=3000)
        result = json.loads((out / "result.json").read_text())
        result["seconds"] |= _exports(work, folder, min(rounds, 3))
    return result | {
        "title": f"Llama {case.size} in bfloat16, AdamW, {RANKS} CPU ranks",
        "machine": probes.machine(),
        "rounds": rounds,
    }


def rows(result: Mapping[str, Any]) -> list[str]:
    """Return the Markdown of a case."""
    seconds, nbytes = result["seconds"], result["nbytes"]
    lines = [
        f"### {result['title']}, {nbytes / 2**30:,.1f} GiB",
        "",
        f"{result['rounds']} rounds. {result['machine']}.",
        "",
        "| | seconds: median (min to max) | ratio |",
        "| --- | ---: | --- |",
    ]
    references = {
        WAITS: (BARE, "the bare write"), GOES_ON: (BARE, "the bare write"), BLOCKED: (COPY, "the copy"),
        DEEPSPEED: (WAITS, WAITS), RESUME_DEEPSPEED: (RESUME, RESUME), EXPORT_DEEPSPEED: (EXPORT_FP32, EXPORT_FP32),
    }  # fmt: skip
    order = (BARE, WAITS, DEEPSPEED, GOES_ON, BLOCKED, COPY, RESUME, RESUME_DEEPSPEED, EXPORT, EXPORT_FP32, EXPORT_DEEPSPEED)
    for name in order:
        if name not in seconds:
            continue
        times, ratio = seconds[name], ""
        if name in references:
            base, what = references[name]
            value = statistics.median(one / other for one, other in zip(times, seconds[base], strict=False))
            ratio = f"{value:.2f} times {what}"
        lines.append(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {ratio} |")
    return [*lines, "", f"While training waits for a save, rank 0 takes {result['memory'] / 2**20:,.0f} MiB more.", ""]


def main() -> None:
    """Run the comparison, and print the tables."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=names, default=names[:-1], help="default: all but tiny")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "zero_sft" / "bench")
    parser.add_argument("--write", type=Path, help="put the tables into this Markdown file, and the raw results next to it")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    results = {case.name: run_case(case, options.cache, options.rounds) for case in CASES if case.name in options.cases}
    if options.write:
        from benchmarks.load import write_document

        path = options.write.with_suffix(".json")
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**kept, "saving": {**kept.get("saving", {}), **results}}, indent=1), encoding="utf-8")
        write_document(options.write)
    print("\n".join(line for result in results.values() for line in rows(result)))


if __name__ == "__main__":
    main()
