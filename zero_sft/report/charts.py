"""Draw charts as SVG text, without a library: lines over steps, and spans over time. Pure.

Colours are those of the page's style sheet: `series-0`, `series-1`, and so on, which differ in light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from zero_sft.report.runs import Points

WIDTH, WIDE, HEIGHT = 720, 1180, 240
"""Of a chart, of one that is as wide as the page, and the height of both."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34
_MOST_POINTS = 600
_COLOURS = 6


def line_chart(series: Mapping[str, Points], label: str, *, width: int = WIDTH) -> str:
    """Draw lines over steps, with a legend if there are several. "" without a point.

    Args:
        series: by name; each keeps its colour if others have no points.
        label: of the vertical axis.
    """
    shown = {name: _thinned(points) for name, points in series.items() if points}
    if not shown:
        return ""
    steps = [step for points in shown.values() for step, _ in points]
    values = [value for points in shown.values() for _, value in points]
    x_ticks, y_ticks = ticks(min(steps), max(steps), whole=True), ticks(min(values), max(values))
    x_low, x_high = min(*steps, x_ticks[0]), max(*steps, x_ticks[-1])
    y_low, y_high = min(*values, y_ticks[0]), max(*values, y_ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - x_low) / ((x_high - x_low) or 1) * (width - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - y_low) / ((y_high - y_low) or 1) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts, places = [], {name: index for index, name in enumerate(series)}
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4}">{tick_label(tick, y_ticks)}</text>')
    for tick in x_ticks:
        x = place(tick, y_low)[0]
        parts.append(f'<text class="tick middle" x="{x}" y="{HEIGHT - _BOTTOM + 16}">{number(tick)}</text>')
    for name, points in shown.items():
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        kind = f"series-{places[name] % _COLOURS}"
        if len(points) > 1:
            parts.append(f'<polyline class="{kind}" points="{path}"/>')
        marks = points if len(points) <= 60 else [points[-1]]
        for step, value in marks:
            x, y = place(step, value)
            title = escape(f"{name}: {number(value)} at step {number(step)}")
            parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="2.5"><title>{title}</title></circle>')
    axis = f'<text class="tick middle" x="{(width + _LEFT) / 2}" y="{HEIGHT - 4}">step</text>'
    return _svg("".join([*parts, axis]), width, HEIGHT, label) + _legend({name: places[name] for name in shown})


def span_chart(rows: Sequence[tuple[str, Sequence[tuple[float, float, str]], Sequence[tuple[float, str]]]], label: str) -> str:
    """Draw rows of spans over time, with marks on them. "" without a row.

    Args:
        rows: for each its name, its spans (seconds at the begin and end, title) and its marks (seconds, title).
    """
    end = max((stop for _, spans, _ in rows for _, stop, _ in spans), default=0.0) or 1.0
    if not rows:
        return ""
    height, parts = 26 * len(rows) + 30, []

    def place(seconds: float) -> float:
        return round(110 + seconds / end * (WIDTH - 122), 1)

    for index, (name, spans, marks) in enumerate(rows):
        y = 8 + 26 * index
        parts.append(f'<text class="tick end" x="104" y="{y + 13}">{escape(name)}</text>')
        for start, stop, title in spans:
            width = max(1.0, place(stop) - place(start))
            parts.append(
                f'<rect class="series-{index % _COLOURS}" x="{place(start)}" y="{y}" width="{width:.1f}" height="18" rx="3">'
                f"<title>{escape(title)}</title></rect>"
            )
        for seconds, title in marks:
            x = place(seconds)
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{y}" y2="{y + 18}"><title>{escape(title)}</title></line>')
    for tick in ticks(0.0, end):
        if tick <= end:
            parts.append(f'<text class="tick middle" x="{place(tick)}" y="{height - 8}">{duration(tick)}</text>')
    return _svg("".join(parts), WIDTH, height, label)


def bar_chart(bars: Sequence[tuple[str, int]], label: str) -> str:
    """Draw horizontal bars, each with its name and its number. "" without a bar."""
    most, height, parts = max((count for _, count in bars), default=0) or 1, 24 * len(bars) + 8, []
    for index, (name, count) in enumerate(bars):
        y, length = 4 + 24 * index, round(count / most * (WIDE - 320), 1)
        parts.append(f'<text class="tick end" x="190" y="{y + 13}">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="200" y="{y}" width="{length}" height="18" rx="3"/>')
        parts.append(f'<text class="tick" x="{206 + length}" y="{y + 13}">{count:,}</text>')
    return _svg("".join(parts), WIDE, height, label) if bars else ""


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return three to seven round numbers that enclose a range.

    Worked example: 0.3 to 2.1 gives 0, 0.5, 1, 1.5, 2, 2.5.
    """
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a flat line, such as the mean of equal numbers
        high = low + (abs(low) if abs(low) > 1e-300 else 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step)
    decimals = 12 - math.floor(math.log10(step))
    return [round(index * step, min(decimals, 320)) for index in range(first, math.ceil(high / step) + 1)]


def tick_label(tick: float, among: Sequence[float]) -> str:
    """Format a tick so that it differs from its neighbours: 5.5215 between 5.521 and 5.522."""
    texts = [number(each) for each in among]
    if len(set(texts)) == len(texts) or among[1] <= among[0]:
        return number(tick)
    decimals = -math.floor(math.log10(among[1] - among[0]))
    return f"{tick:,.{max(0, decimals)}f}"


def number(value: float) -> str:
    """Format a number for an axis: 0.5, 1,200, 2e-05."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Format seconds for an axis: 40 s, 12 min, 3.5 h, 2 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _thinned(points: Points) -> Points:
    """Return at most `_MOST_POINTS` points: of each group the mean, and the last point."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [*((group[-1][0], sum(value for _, value in group) / len(group)) for group in groups[:-1]), points[-1]]


def _svg(content: str, width: int, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _legend(places: Mapping[str, int]) -> str:
    if len(places) < 2:
        return ""
    items = (f'<span><i class="series-{index % _COLOURS}"></i>{escape(name)}</span>' for name, index in places.items())
    return f'<p class="legend">{"".join(items)}</p>'
