"""The benchmark's results as Markdown and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ways import OURS, ROOFLINES, STOCK

ROOFLINE = "bare read"


def document(cases: Sequence[Mapping[str, Any]], picture: str | None) -> str:
    """A Markdown document: a table a case."""
    lines = ["# Benchmarks", "", "Made by `make bench`: in each round every way has one turn.", ""]
    if picture:
        lines += [f"![seconds of the slowest rank, by way]({picture})", ""]
    lines += [
        "Seconds are the slowest rank's; ratios are medians over rounds. The bare read reads the same bytes with `preadv` into "
        "fresh memory and does nothing else; of plain, huge and populated pages with one and two threads, the two that are "
        "fastest in rounds of their own take turns with the others, and the one with the least median is shown. Free memory is "
        "touched before each turn, so that none pays for what a hypervisor has taken back. Memory is a rank's growth over what "
        "the interpreter had: private and shared, and mapped files. "
        "Spread is how much earlier than the slowest rank the fastest was ready. The tables from process start on "
        "include imports, and DeepSpeed's engine, which moves the shards into memory of its own.",
        "",
    ]
    for case in cases:
        lines += [
            f"## {case['title']}, {case['nbytes'] / 2**20:,.0f} MiB",
            "",
            f"{case['rounds']} rounds. {case['machine']}.",
            "",
        ]
        lines += [*_table(case), ""]
    return "\n".join(lines)


def with_one_roofline(case: Mapping[str, Any]) -> dict[str, list[dict]]:
    """The runs by way, of the bare reads the fastest only, under the name `ROOFLINE` and first."""
    runs = case["runs"]
    best = min((way for way in runs if way in ROOFLINES), key=lambda way: _median(runs[way], "seconds"))
    return {f"{ROOFLINE} ({best.partition(', ')[2]})": runs[best]} | {
        way: results for way, results in runs.items() if way not in ROOFLINES
    }


def _median(results: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def _ratio(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> float:
    """The median of the ratios within rounds."""
    return statistics.median(one["seconds"] / other["seconds"] for one, other in zip(ones, others, strict=True))


def _table(case: Mapping[str, Any]) -> list[str]:
    runs = with_one_roofline(case)
    bare, ours = next(iter(runs.values())), runs[OURS]
    share = case["nbytes"] / case["ranks"]
    rows = [
        "| way | seconds: median (least to most) | x bare read | x zero_sft | MiB private | MiB mapped "
        "| of its share read by calls | read calls | MiB through loopback | spread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, results in runs.items():
        seconds = [result["seconds"] for result in results]
        of = {key: _median(results, key) for key in ("memory", "file_memory", "read", "requests", "loopback", "spread")}
        rows.append(
            f"| {way} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
            f"| {_ratio(results, bare):.2f} | {_ratio(results, ours):.2f} | {of['memory'] / 2**20:,.0f} "
            f"| {of['file_memory'] / 2**20:,.0f} | {of['read'] / share:.3f} | {of['requests']:,.0f} "
            f"| {of['loopback'] / 2**20:,.2f} | {of['spread']:.0%} |"
        )
    trials = (f"{way.partition(', ')[2]} {_median(results, 'seconds'):.2f}" for way, results in case["trials"].items())
    rows += ["", f"Bare reads by themselves, in seconds: {'; '.join(trials)}."]
    stages = {name: statistics.median(result["stages"][name] for result in ours) for name in ours[0]["stages"]}
    rows += ["", "Of the load, in seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in stages.items()) + "."]
    rows[-1] += f" A rank took {_median(ours, 'taken') / share:.3f} of its share of the files."
    if case["starts"]:
        rows += ["", *_starts(case["starts"])]
    return rows


def _starts(starts: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """A table: seconds from the start of the processes, by way, and the ratio to transformers'."""
    rows = [
        "| way | process start to loaded model, in seconds | x transformers | to DeepSpeed's engine | x transformers |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, seconds in starts.items():
        cells = []
        for one, other in zip(zip(*seconds, strict=True), zip(*starts[STOCK], strict=True), strict=True):
            ratio = statistics.median(mine / theirs for mine, theirs in zip(one, other, strict=True))
            cells += [f"{statistics.median(one):.2f}", f"{ratio:.2f}"]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the medians, with least and most, a row a case; seconds on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(cases), 1, figsize=(9, 0.6 + 2.4 * len(cases)), dpi=110, squeeze=False)
    for axes, case in zip(rows[:, 0], cases, strict=True):
        runs = with_one_roofline(case)
        for position, results in enumerate(runs.values()):
            seconds = [result["seconds"] for result in results]
            middle = statistics.median(seconds)
            errors = [[middle - min(seconds)], [max(seconds) - middle]]
            colour = "tab:green" if list(runs)[position] == OURS else "tab:gray"
            axes.barh([position], [middle], xerr=errors, color=colour, height=0.7)
            axes.annotate(f" {middle:.2f} s", (max(seconds), position), va="center", fontsize="small")
        axes.set_yticks(range(len(runs)), list(runs), fontsize="small")
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(case["title"], fontsize="medium")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
