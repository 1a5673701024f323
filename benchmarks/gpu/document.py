"""Show the results as a Markdown page: tables of the measurements, and the last lines of output of each failed part."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.isolation import Outcome
from benchmarks.gpu.load import BARE, COPIES, OURS
from benchmarks.gpu.parts import REFERENCE, TESTS, result_of
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.train import WARM_STEPS

LOSS_TOLERANCE = 0.01
"""The maximum relative difference of a step's loss from sdpa's, as bf16 kernels add in different orders."""

Outcomes = Mapping[str, Outcome]


def document(settings: Settings, outcomes: Outcomes) -> str:
    """Return a Markdown page with all results."""
    sections = [_head(settings), _parts(outcomes), _machine(result_of(outcomes, "machine")), _tests(outcomes)]
    sections += [_load(result_of(outcomes, "load")), _training(settings, outcomes), _memory(outcomes), _failures(outcomes)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(settings: Settings) -> str:
    dry_run = "`python -m benchmarks.gpu --dry_run`, whose numbers are not meaningful"
    command = dry_run if settings.dry_run else "`make bench-gpu`"
    return (
        "# On a GPU\n\nFor readers who need measurements on real hardware. Everything else in this repository was "
        f"measured on CPU ranks.\n\nMade by {command}, {time.strftime('%Y-%m-%d')}: one rank, a Llama of "
        f"{settings.parameters / 1e9:.2f} B parameters with random weights in bf16."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignments = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, alignments, *rows))


def _parts(outcomes: Outcomes) -> str:
    rows = []
    for name, outcome in outcomes.items():
        status = f"skipped: {outcome.tail}" if outcome.status == "skipped" and outcome.tail else outcome.status
        rows.append([name, status, f"{outcome.seconds:.0f}", f"{outcome.limit_s:.0f}"])
    return "## Parts\n\n" + _table(("part", "outcome", "seconds", "limit"), rows)


def _machine(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version != "none")
    rows = [["device", f"{facts['device']}, {facts.get('device_gib', 0):.0f} GiB, driver {facts.get('driver', '?')}"]]
    rows.append(
        [
            "bf16 matrix product of 8192 x 8192",
            f"{facts.get('matmul_tflops', 0):.0f} TFLOP/s; datasheet {facts.get('datasheet_tflops')}",
        ]
    )
    rows.append(["host", f"{facts['cpu']}, {facts['cores']} cores, {facts['memory']}, kernel {facts['kernel']}"])
    rows.append(["disk", f"{facts['disk']}, {facts['disk_free_gib']} GiB free"])
    rows.append(["Python", f"{facts['python']}; CUDA of torch {facts['cuda']}"])
    rows.append(["packages", packages])
    rows.append(["compilers", ", ".join(f"{name}: {path}" for name, path in facts["compilers"].items())])
    return "## Machine\n\n" + "\n".join(f"- {name}: {value}" for name, value in rows)


def _tests(outcomes: Outcomes) -> str:
    tests = result_of(outcomes, TESTS)
    if not any(tests.get(kind) for kind in ("passed", "failed", "skipped")):
        return ""
    counts = {kind: len(tests[kind]) for kind in ("passed", "failed", "skipped")}
    lines = ["## Tests", "", "`make test-gpu`: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) + "."]
    lines += ["", *(f"- {name}" for name in tests["passed"])]
    reasons = sorted({tests["lines"].get(name, "devices or packages are missing") for name in tests["skipped"]})
    lines += ["", f"Skipped: {'; '.join(reasons)}."] if reasons else []
    for name in tests["failed"]:
        lines += ["", f"Failed: {name}", "", "```", tests["lines"].get(name, "see the log below"), "```"]
    return "\n".join(lines)


def _load(result: Mapping[str, Any]) -> str:
    seconds = {name: times for name, times in result.get("seconds", {}).items() if times}
    if OURS not in seconds:
        return ""
    gigabytes = result["bytes"] / 1e9

    def ratio(name: str, reference: str) -> str:
        """Return the median of the ratios within rounds."""
        pairs = list(zip(seconds[name], seconds.get(reference, ()), strict=False))
        return f"{statistics.median(loader_s / reference_s for loader_s, reference_s in pairs):.2f}" if pairs else ""

    order = [COPIES, *(name for name in seconds if name.startswith(BARE.split(",")[0])), *seconds]
    rows = [
        [name, f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
         f"{gigabytes / statistics.median(times):.1f}", ratio(name, COPIES), ratio(name, OURS)]
        for name in dict.fromkeys(order) if (times := seconds.get(name))
    ]  # fmt: skip
    stages = result["reports"].get(OURS, {}).get("stages", {})
    paragraphs = [
        f"## Load\n\n{gigabytes:.2f} GB of weights onto the device, warm page cache, {len(seconds[OURS])} rounds. Every loader "
        "runs once per round, in one process. Pinned copies move the same number of bytes from one page-locked buffer and read "
        "nothing; bare reads read the files and copy nothing. Ratios are medians of the ratios within rounds.",
        _table(("loader", "seconds: median (min to max)", "GB/s", f"x {COPIES}", f"x {OURS}"), rows),
        f"Stages of {OURS}, in seconds: {', '.join(f'{stage} {value:.3f}' for stage, value in stages.items())}.",
    ]
    cold = {name: times for name, times in result.get("cold", {}).items() if times}
    if cold:
        cold_times = ", ".join(f"{name} {times[0]:.2f} s" for name, times in cold.items())
        paragraphs.append(f"Cold page cache, one run: {cold_times}.")
    paragraphs += [f"Note: {note}." for note in result.get("notes", ())]
    return "\n\n".join(paragraphs)


def _training(settings: Settings, outcomes: Outcomes) -> str:
    runs = {name: dict(outcome.result) for name, outcome in outcomes.items() if name.startswith("train-") and outcome.result}
    if not runs:
        return ""
    machine, reference = result_of(outcomes, "machine"), runs.get(REFERENCE, {}).get("losses", [])
    rows = [[*_row(run, machine), _difference(run["losses"], reference)] for run in runs.values()]
    head = (
        "run",
        "steps",
        "loss, first to last",
        "tokens/s",
        "MFU, datasheet",
        "MFU, measured product",
        "peak GiB",
        "loss difference to sdpa",
    )
    return (
        f"## Training\n\nPacked rows of {settings.length:,} tokens, {settings.rows} per step in micro-batches of one, "
        "activation checkpointing, torch's fused AdamW, DeepSpeed ZeRO-3 on one rank. Tokens/s: medians without the first "
        f"{WARM_STEPS} steps. MFU counts a forward and a backward pass without recomputation. TRL's run is a plain script "
        "with a model that transformers has loaded, and the same rows in the same order.\n\n" + _table(head, rows)
    )


def _row(run: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[str]:
    seconds = run["seconds"][WARM_STEPS:] or run["seconds"][-1:]
    speed = run["tokens_a_step"] / statistics.median(seconds) if seconds else 0.0
    yield f"{'TRL alone' if run['trainer'] == 'trl' else run['trainer']}, {run['attention']}"
    yield str(len(run["seconds"]))
    yield f"{run['losses'][0]:.3f} to {run['losses'][-1]:.3f}" if run["losses"] else "none"
    yield f"{speed:,.0f}"
    for key in ("datasheet_tflops", "matmul_tflops"):
        peak = machine.get(key)
        yield f"{speed * run['flops_a_token'] / peak / 1e12:.1%}" if peak else "unknown"
    yield f"{run.get('peak_allocated', 0) / 2**30:.1f}"


def _difference(losses: Sequence[float], reference: Sequence[float]) -> str:
    pairs = list(zip(losses, reference, strict=False))
    if not pairs:
        return "unknown"
    largest = max(abs(loss / reference_loss - 1) for loss, reference_loss in pairs)
    return f"{largest:.2%} at most: {'within' if largest < LOSS_TOLERANCE else '**not within**'} {LOSS_TOLERANCE:.0%}"


def _memory(outcomes: Outcomes) -> str:
    estimate, run = result_of(outcomes, "memory"), result_of(outcomes, REFERENCE)
    if not estimate:
        return ""
    gib = 2**30
    rows = [[name, f"{nbytes / gib:.2f}"] for name, nbytes in estimate["device"].items()]
    phase = estimate["longest_phase"]
    rows += [[f"{phase}: {name}", f"{nbytes / gib:.2f}"] for name, nbytes in estimate["phases"][phase].items()]
    rows.append(["estimated peak", f"{estimate['device_peak'] / gib:.2f}"])
    if "peak_allocated" in run:
        ratio = estimate["device_peak"] / run["peak_allocated"]
        rows.append(["measured: peak allocated by torch", f"{run['peak_allocated'] / gib:.2f} (estimate x {ratio:.2f})"])
        rows.append(["measured: peak reserved by torch", f"{run['peak_reserved'] / gib:.2f}"])
        rows.append(["estimated peak plus runtime", f"{(estimate['device_peak'] + estimate['runtime']) / gib:.2f}"])
        rows.append(["measured: in use on the GPU", f"{run['device_used'] / gib:.2f}"])
    return (
        "## Memory\n\nDevice memory of the sdpa run in GiB, estimated by `python -m zero_sft.estimate` and measured. The "
        "estimate includes all logits of a batch, which TRL's fused head avoids.\n\n" + _table(("component", "GiB"), rows)
    )


def _failures(outcomes: Outcomes) -> str:
    failed = [outcome for outcome in outcomes.values() if outcome.status in ("failed", "out of time")]
    if not failed:
        return ""
    sections = [f"### {part.name}: {part.status} after {part.seconds:.0f} s\n\n```\n{part.tail}\n```" for part in failed]
    return "## What failed\n\n" + "\n\n".join(sections)
