"""Make one HTML page about runs, which needs no other file and no script. Pure."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from zero_sft.report.charts import WIDE, duration, line_chart, number, span_chart
from zero_sft.report.html import html_page, section
from zero_sft.report.runs import Points, Run


def page(runs: Sequence[Run], *, refresh_seconds: int = 0) -> str:
    """Return the page.

    Args:
        refresh_seconds: the browser asks for the page again after this time; 0: it does not.
    """
    names = _names(runs)
    colours = "".join(
        f"polyline.series-{i} {{ stroke: var(--c{i}); }} circle.series-{i}, rect.series-{i} {{ fill: var(--c{i}); }} "
        f".legend i.series-{i} {{ background: var(--c{i}); }}\n"
        for i in range(6)
    )
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    rates = {name: run.rate for name, run in zip(names, runs, strict=True)}
    sections = [
        *_losses(runs, names),
        section("Learning rate", line_chart(_of_runs(runs, names, "learning_rate"), "learning rate")),
        section("Norm of the gradient", line_chart(_of_runs(runs, names, "grad_norm"), "norm of the gradient")),
        section("Tokens per second, all ranks", line_chart(rates, "tokens per second")),
        section("Time", _timeline(runs, names)),
        *(section(f"Load of {name}" if len(runs) > 1 else "Load", _load(run)) for name, run in zip(names, runs, strict=True)),
        *(section(f"Answers of {name}" if len(runs) > 1 else "Answers", _answers(run), wide=True)
          for name, run in zip(names, runs, strict=True)),
        section("Starts", _starts(runs, names), wide=True),
        section("Arguments", _arguments(runs, names), wide=True),
    ]  # fmt: skip
    return html_page(", ".join(names), _summary(runs), sections, style=colours, head=refresh)


def _names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: that of its folder, or its whole path where two are alike."""
    short = [run.folder.resolve().name or str(run.folder) for run in runs]
    return [name if short.count(name) == 1 else str(run.folder) for name, run in zip(short, runs, strict=True)]


def _of_runs(runs: Sequence[Run], names: Sequence[str], metric: str) -> dict[str, Points]:
    return {name: run.series.get(metric, ()) for name, run in zip(names, runs, strict=True)}


def _losses(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Draw the losses, and those on held-out samples: in one chart for one run, in two for several."""
    training, held_out = (_of_runs(runs, names, metric) for metric in ("loss", "eval_loss"))
    if len(runs) == 1:
        both = {"training": training[names[0]], "held out": held_out[names[0]]}
        return [section("Loss", line_chart(both, "loss", width=WIDE), wide=True)]
    charts = {"Loss": training, "Loss on held-out samples": held_out}
    return [section(title, line_chart(series, "loss", width=WIDE), wide=True) for title, series in charts.items()]


def _summary(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        losses = run.series.get("loss", ())
        last = f"step {number(losses[-1][0])}, loss {losses[-1][1]:.4g}" if losses else "no step was logged"
        parts.append(f"{last}, {len(run.starts)} start{'s' * (len(run.starts) != 1)}.")
    return " ".join(parts) if len(parts) == 1 else f"{len(runs)} runs."


def _timeline(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Draw each run from its first start on: a span for each start, a mark for each checkpoint."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        if not run.spans:
            continue
        began = run.spans[0][0]
        spans = [
            (start - began, end - began, f"start {index}: {duration(end - start)}")
            for index, (start, end) in enumerate(run.spans, start=1)
        ]
        marks = [
            (event["time"] - began, f"checkpoint of step {number(event['step'])}")
            for event in run.events
            if event["event"] == "checkpoint"
        ]
        rows.append((name[:16], spans, marks))
    chart = span_chart(rows, "time")
    return chart and chart + '<p class="soft">A bar for each start of a run; a mark for each checkpoint.</p>' + _shares(
        runs, names
    )


def _shares(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        seconds = run.starts[-1].get("seconds") if run.starts else None
        if isinstance(seconds, dict):
            cells = [
                f"{key} {duration(value)}"
                for key, value in seconds.items()
                if isinstance(value, (int, float)) and value >= 0.05
            ]
            rows.append([name, ", ".join(cells)])
    return _table(["run", "seconds of its last start"], rows)


def _load(run: Run) -> str:
    """Draw the load's stages on each rank, one after the other, and tell what was read."""
    ranks = run.load.get("ranks")
    rows = []
    for index, rank in enumerate(ranks[:64] if isinstance(ranks, list) else ()):
        spans, at = [], 0.0
        for key, value in _mapping(rank).items():
            if str(key).startswith("stage ") and isinstance(value, (int, float)):
                spans.append((at, at + value, f"{key.removeprefix('stage ')}: {value:.3g} s"))
                at += value
        rows.append((f"rank {index}", spans, [(stop, title) for _, stop, title in spans[:-1]]))
    chart = span_chart(rows, "load") if any(spans for _, spans, _ in rows) else ""
    facts = {
        name: run.load.get(name)
        for name in ("model", "loader", "dtype", "parameters", "seconds", "bytes_read", "requests", "world_size")
    }
    rows_of_facts = [[name.replace("_", " "), _amount(value)] for name, value in facts.items() if value is not None]
    return chart + _table(["", ""], rows_of_facts) if run.load else ""


def _answers(run: Run) -> str:
    """Show the answers to each prompt: before the training, while it went on, and after it."""
    columns: dict[str, dict[str, str]] = {}
    for answer in run.answers:
        columns.setdefault("before", {})[_text(answer.get("prompt"))] = _text(answer.get("before"))
    for event in run.events:
        pairs = event.get("answers")
        for pair in pairs if event["event"] == "answers" and isinstance(pairs, list) else ():
            prompt, text = _mapping(pair).get("prompt"), _mapping(pair).get("answer")
            columns.setdefault(f"step {number(event['step'])}", {})[_text(prompt)] = _text(text)
    for answer in run.answers:
        columns.setdefault("after", {})[_text(answer.get("prompt"))] = _text(answer.get("after"))
    prompts = list(dict.fromkeys(prompt for column in columns.values() for prompt in column))
    return _table(
        ["prompt", *columns], [[prompt, *(column.get(prompt, "") for column in columns.values())] for prompt in prompts]
    )


def _starts(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        for index, start in enumerate(run.starts, start=1):
            versions = start.get("versions")
            libraries = ", ".join(f"{key} {value}" for key, value in versions.items()) if isinstance(versions, dict) else ""
            times = [_text(start.get(key))[:19].replace("T", " ") for key in ("began", "ended")]
            cells = [start.get(key) for key in ("from_step", "step", "host", "ranks")]
            commit = _text(start.get("git_commit"))
            rows.append([name, str(index), *times, *map(_text, cells), commit[:12] + "+" * commit.endswith("+"), libraries])
    return _table(["run", "start", "began", "ended", "from step", "to step", "host", "ranks", "commit", "versions"], rows)


def _arguments(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Show the arguments of the last start of each run, those first that differ between the runs."""
    columns = [_mapping(run.starts[-1].get("arguments")) if run.starts else {} for run in runs]
    keys = sorted({key for column in columns for key in column})
    rows = [[key, *(_text(column.get(key)) for column in columns)] for key in keys]
    differing = [len(set(row[1:])) > 1 for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (not differing[index], rows[index][0]))
    return _table(["", *names], [rows[index] for index in order], [differing[index] for index in order])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    try:
        return "" if value is None else str(value)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to show"


def _amount(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and abs(value) < 1e100
    return number(value) if is_number else _text(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    if not rows:
        return ""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    lines = []
    for index, row in enumerate(rows):
        kind = ' class="differs"' if index < len(marked) and marked[index] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td><pre>{escape(cell[:2000])}</pre></td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{f"<tr>{header}</tr>" if header else ""}{"".join(lines)}</table></div>'
