"""The results as a page: tables of what was measured, and what failed with the last lines of its output."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.isolation import Outcome
from benchmarks.gpu.load import BARE, COPIES, OURS
from benchmarks.gpu.parts import REFERENCE, TESTS, finished
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.train import WARM_STEPS

LOSS_TOLERANCE = 0.01
"""How far a step's loss may be from sdpa's, as a part of it: bf16 kernels that add in other orders."""

Outcomes = Mapping[str, Outcome]


def document(settings: Settings, outcomes: Outcomes) -> str:
    """Markdown of all that there is."""
    sections = [_head(settings), _parts(outcomes), _machine(finished(outcomes, "machine")), _tests(outcomes)]
    sections += [_load(finished(outcomes, "load")), _training(settings, outcomes), _memory(outcomes), _failures(outcomes)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(settings: Settings) -> str:
    how = (
        "`make bench-gpu`"
        if not settings.dry_run
        else "`python -m benchmarks.gpu --dry_run`, which shows nothing but that it runs"
    )
    return (
        "# On a GPU\n\nFor readers who want to know what was seen on real hardware. Everything else in this repository was "
        f"measured on CPU ranks.\n\nMade by {how}, {time.strftime('%Y-%m-%d')}: one rank, a Llama of "
        f"{settings.parameters / 1e9:.2f} B parameters with random weights in bf16."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def _parts(outcomes: Outcomes) -> str:
    rows = [
        [name, each.status if not (each.status == "skipped" and each.tail) else f"skipped: {each.tail}", f"{each.seconds:.0f}",
         f"{each.limit_s:.0f}"]
        for name, each in outcomes.items()
    ]  # fmt: skip
    return "## Parts\n\n" + _table(("part", "outcome", "seconds", "limit"), rows)


def _machine(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version != "none")
    rows = [["device", f"{facts['device']}, {facts.get('device_gib', 0):.0f} GiB, driver {facts.get('driver', '?')}"]]
    rows.append(
        [
            "bf16 product of 8192 x 8192",
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
    found = finished(outcomes, TESTS)
    if not any(found.get(kind) for kind in ("passed", "failed", "skipped")):
        return ""
    counts = {kind: len(found[kind]) for kind in ("passed", "failed", "skipped")}
    lines = ["## Tests", "", "`make test-gpu`: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) + "."]
    lines += ["", *(f"- {name}" for name in found["passed"])]
    needs = sorted({found["lines"].get(name, "for want of devices or packages") for name in found["skipped"]})
    lines += ["", f"Skipped: {'; '.join(needs)}."] if needs else []
    for name in found["failed"]:
        lines += ["", f"Failed: {name}", "", "```", found["lines"].get(name, "see the log below"), "```"]
    return "\n".join(lines)


def _load(found: Mapping[str, Any]) -> str:
    seconds = {name: times for name, times in found.get("seconds", {}).items() if times}
    if OURS not in seconds:
        return ""
    gigabytes = found["bytes"] / 1e9

    def ratios(name: str, other: str) -> str:
        """The median of the ratios within rounds."""
        pairs = list(zip(seconds.get(other, ()), seconds[name], strict=False))
        return f"{statistics.median(mine / theirs for theirs, mine in pairs):.2f}" if pairs else ""

    order = [COPIES, *(name for name in seconds if name.startswith(BARE.split(",")[0])), *seconds]
    rows = [
        [name, f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
         f"{gigabytes / statistics.median(times):.1f}", ratios(name, COPIES), ratios(name, OURS)]
        for name in dict.fromkeys(order) if (times := seconds.get(name))
    ]  # fmt: skip
    stages = found["reports"].get(OURS, {}).get("stages", {})
    text = [
        f"## Load\n\n{gigabytes:.2f} GB of weights onto the device, warm page cache, {len(seconds[OURS])} rounds. Every way "
        "has one turn a round, in one process. Pinned copies move as many bytes from one page-locked buffer and read nothing; "
        "bare reads read the files and copy nothing. Ratios are medians within rounds.",
        _table(("way", "seconds: median (least to most)", "GB/s", f"x {COPIES}", f"x {OURS}"), rows),
        f"Of {OURS}, in seconds: {', '.join(f'{stage} {value:.3f}' for stage, value in stages.items())}.",
    ]
    cold = {name: times for name, times in found.get("cold", {}).items() if times}
    if cold:
        text.append("Cold page cache, one turn: " + ", ".join(f"{name} {times[0]:.2f} s" for name, times in cold.items()) + ".")
    text += [f"Note: {note}." for note in found.get("notes", ())]
    return "\n\n".join(text)


def _training(settings: Settings, outcomes: Outcomes) -> str:
    runs = {name: dict(each.result) for name, each in outcomes.items() if name.startswith("train-") and each.result}
    if not runs:
        return ""
    machine, reference = finished(outcomes, "machine"), runs.get(REFERENCE, {}).get("losses", [])
    rows = [[*_row(run, machine), _difference(run["losses"], reference)] for run in runs.values()]
    head = (
        "run",
        "steps",
        "loss, first to last",
        "tokens/s",
        "MFU, datasheet",
        "MFU, measured product",
        "GiB at most",
        "loss next to sdpa",
    )
    return (
        f"## Training\n\nPacked rows of {settings.length:,} tokens, {settings.rows} a step one at a time, checkpointed "
        "activations, AdamW (torch's fused one), DeepSpeed ZeRO-3 on one rank. Tokens/s: medians without the first "
        f"{WARM_STEPS} steps. MFU counts a forward and a backward pass, recomputation left out. TRL's run is a plain script "
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
    worst = max(abs(one / other - 1) for one, other in pairs)
    return f"{worst:.2%} at most: {'within' if worst < LOSS_TOLERANCE else '**not within**'} {LOSS_TOLERANCE:.0%}"


def _memory(outcomes: Outcomes) -> str:
    estimate, run = finished(outcomes, "memory"), finished(outcomes, REFERENCE)
    if not estimate:
        return ""
    gib = 2**30
    rows = [[name, f"{nbytes / gib:.2f}"] for name, nbytes in estimate["device"].items()]
    phase = estimate["longest_phase"]
    rows += [[f"{phase}: {name}", f"{nbytes / gib:.2f}"] for name, nbytes in estimate["phases"][phase].items()]
    rows.append(["estimated peak", f"{estimate['device_peak'] / gib:.2f}"])
    if "peak_allocated" in run:
        ratio = estimate["device_peak"] / run["peak_allocated"]
        rows.append(["measured: most allocated by torch", f"{run['peak_allocated'] / gib:.2f} (estimate x {ratio:.2f})"])
        rows.append(["measured: most reserved by torch", f"{run['peak_reserved'] / gib:.2f}"])
        rows.append(["estimated peak and runtime", f"{(estimate['device_peak'] + estimate['runtime']) / gib:.2f}"])
        rows.append(["measured: in use on the card", f"{run['device_used'] / gib:.2f}"])
    return (
        "## Memory\n\nGiB of the device in the sdpa run, as `python -m zero_sft.estimate` counts them and as they were. The "
        "estimate counts all logits of a batch, which TRL's fused head does not make.\n\n" + _table(("what", "GiB"), rows)
    )


def _failures(outcomes: Outcomes) -> str:
    failed = [each for each in outcomes.values() if each.status in ("failed", "out of time")]
    if not failed:
        return ""
    parts = [f"### {each.name}: {each.status} after {each.seconds:.0f} s\n\n```\n{each.tail}\n```" for each in failed]
    return "## What failed\n\n" + "\n\n".join(parts)
