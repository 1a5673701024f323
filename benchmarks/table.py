"""Show the benchmark's results as a Markdown document and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ways import OURS, ROOFLINES, STOCK

ROOFLINE = "bare read"


def document(cases: Sequence[Mapping[str, Any]], picture: str | None, saving: Sequence[Sequence[str]] = ()) -> str:
    """Return a Markdown document with one table per case, and the lines of the tables of `benchmarks.save`."""
    lines = ["# Benchmarks", "", "Made by `make bench`: in each round every loader runs once.", ""]
    if picture:
        lines += [f"![seconds of the slowest rank, by loader]({picture})", ""]
    lines += [
        "- Seconds are those of the slowest rank. Ratios are medians of the ratios within rounds.",
        "- The bare read reads the same bytes with `preadv` into fresh memory and does nothing else. It has variants with "
        "plain, huge and populated pages and with one and two threads. The fastest two take part in the rounds, and the table "
        "shows the faster.",
        "- torch_dcp is PyTorch's reader of such files, into FSDP2 shards. safetensors_slices copies this rank's rows with "
        "`get_slice`. fastsafetensors reads files on some ranks, and scatters the rows. With runai_streamer every rank reads "
        "all files. runai_ranges is its best case: it reads the byte ranges of this rank's rows, found by this project. Only "
        "zero_sft and transformers make ZeRO-3 parameters.",
        "- Free memory is touched before each run, so that no loader pays for memory that a hypervisor has taken back.",
        "- Memory is the growth of a rank over the bare interpreter: private and shared memory, and mapped files.",
        "- Spread is how much earlier the fastest rank was ready than the slowest.",
        "- The tables from process start include imports and DeepSpeed's engine, which copies the shards into its buffers.",
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
    if saving:
        lines += [
            "## Saving, resuming, exporting",
            "",
            "Made by `make bench-save`. A checkpoint holds bf16 weights, fp32 master weights and AdamW's moments. In each "
            "round every way saves the same state once. The bare write writes as many bytes per rank from memory, and syncs "
            "them.",
            "",
            *(line for lines_of_case in saving for line in lines_of_case),
        ]
    return "\n".join(lines)


def with_one_roofline(case: Mapping[str, Any]) -> dict[str, list[dict]]:
    """Return the runs of each loader, after those of the fastest bare read under the name `ROOFLINE`."""
    runs = case["runs"]
    best = min((way for way in runs if way in ROOFLINES), key=lambda way: _median(runs[way], "seconds"))
    others = {way: results for way, results in runs.items() if way not in ROOFLINES}
    return {f"{ROOFLINE} ({best.partition(', ')[2]})": runs[best]} | others


def _median(results: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def _ratio(results: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> float:
    """Return the median of the ratios within rounds."""
    return statistics.median(run["seconds"] / base["seconds"] for run, base in zip(results, reference, strict=True))


def _table(case: Mapping[str, Any]) -> list[str]:
    runs = with_one_roofline(case)
    bare, ours = next(iter(runs.values())), runs[OURS]
    share = case["nbytes"] / case["ranks"]
    rows = [
        "| loader | seconds: median (min to max) | x bare read | x zero_sft | MiB private | MiB mapped "
        "| fraction of its share read by calls | read calls | MiB through loopback | spread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, results in runs.items():
        seconds = [result["seconds"] for result in results]
        median = {key: _median(results, key) for key in ("memory", "file_memory", "read", "requests", "loopback", "spread")}
        rows.append(
            f"| {way} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
            f"| {_ratio(results, bare):.2f} | {_ratio(results, ours):.2f} | {median['memory'] / 2**20:,.0f} "
            f"| {median['file_memory'] / 2**20:,.0f} | {median['read'] / share:.3f} | {median['requests']:,.0f} "
            f"| {median['loopback'] / 2**20:,.2f} | {median['spread']:.0%} |"
        )
    trials = (f"{way.partition(', ')[2]} {_median(results, 'seconds'):.2f}" for way, results in case["trials"].items())
    rows += ["", f"Bare reads in separate rounds, in seconds: {'; '.join(trials)}."]
    stages = {name: statistics.median(result["stages"][name] for result in ours) for name in ours[0]["stages"]}
    rows += ["", "Stages of the load, in seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in stages.items()) + "."]
    rows[-1] += f" A rank read {_median(ours, 'taken') / share:.3f} of its share of the files."
    if case["starts"]:
        rows += ["", *_starts(case["starts"])]
    return rows


def _starts(starts: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """Return a table of the seconds from process start for each loader, and their ratios to transformers."""
    rows = [
        "| loader | process start to loaded model, in seconds | x transformers | to DeepSpeed's engine | x transformers "
        "| to the first step | x transformers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, seconds in starts.items():
        cells = []
        marks, stock_marks = zip(*seconds, strict=True), zip(*starts[STOCK], strict=True)
        for times, stock_times in zip(marks, stock_marks, strict=True):
            ratio = statistics.median(time / stock_time for time, stock_time in zip(times, stock_times, strict=True))
            cells += [f"{statistics.median(times):.2f}", f"{ratio:.2f}"]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bars of the medians with minimum and maximum, one row per case, with seconds on a logarithmic axis."""
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
        axes.set_xlim(right=axes.get_xlim()[1] * 1.3)  # space for the longest bar's label
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.set_title(case["title"], fontsize="medium")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
