"""Make one HTML page about training data: what was read and dropped, the lengths, and samples with what is trained on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zero_sft.report.charts import bar_chart
from zero_sft.report.html import html_page, section

_STYLE = """
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace;
  max-height: 40rem; overflow-y: auto; }
pre.sample mark { background: color-mix(in srgb, var(--c2) 30%, transparent); color: inherit; border-radius: 3px; }
pre.sample mark.light { background: color-mix(in srgb, var(--c4) 30%, transparent); }
rect.bar { fill: var(--c2); }
p.key mark { background: color-mix(in srgb, var(--c2) 30%, transparent); color: inherit; padding: 0 .3rem; border-radius: 3px; }
p.key mark.light { background: color-mix(in srgb, var(--c4) 30%, transparent); }
ul { margin: 0; padding-left: 1.2rem; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPart:
    """A part of a sample's text; `weight` is that of its tokens in the loss, 0 for what is not trained on."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample to show: its place in the data, its number of tokens, and its parts."""

    place: str
    tokens: int
    parts: tuple[ShownPart, ...]


def samples_page(title: str, lines: Sequence[str], bins: Sequence[tuple[int, int, int]], samples: Sequence[ShownSample]) -> str:
    """Return the page.

    Args:
        lines: the report on the data.
        bins: the histogram of lengths, as (first, last, count).
    """
    report = "".join(f"<li>{escape(line)}</li>" for line in lines)
    has_light = any(0 < part.weight < 1 for sample in samples for part in sample.parts)
    key = "<p class=key>Trained on: <mark>green</mark>" + (
        ", with a weight below 1: <mark class=light>yellow</mark></p>" if has_light else "</p>"
    )
    bars = [(f"{first:,} to {last:,}", count) for first, last, count in bins]
    sections = [
        section("What was read", f"<ul>{report}</ul>", wide=True),
        section("Tokens per sample", bar_chart(bars, "samples by their number of tokens"), wide=True),
        section("Samples", key, wide=True) if samples else "",
        *(section(f"{sample.place}: {sample.tokens:,} tokens", _sample(sample), wide=True) for sample in samples),
    ]
    return html_page(title, "What a training sees of its data.", sections, style=_STYLE)


def _sample(sample: ShownSample) -> str:
    parts = []
    for part in sample.parts:
        kind = f" class=light title='weight {part.weight:g}'" if part.weight < 1 else ""
        parts.append(f"<mark{kind}>{escape(part.text)}</mark>" if part.weight else escape(part.text))
    return f"<pre class=sample>{''.join(parts)}</pre>"
