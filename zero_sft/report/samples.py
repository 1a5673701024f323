"""Make one HTML page about training data: what was read and dropped, the lengths, and samples with what is trained on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zero_sft.report.charts import bar_chart
from zero_sft.report.html import html_page, section
from zero_sft.report.kinds import KINDS

_STYLE = """
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace;
  max-height: 40rem; overflow-y: auto; }
pre.sample mark { background: color-mix(in srgb, var(--c2) 30%, transparent); color: inherit; border-radius: 3px; }
pre.sample mark.light { background: color-mix(in srgb, var(--c4) 30%, transparent); }
rect.bar, rect.share { fill: var(--c2); }
pre.sample i, p.key i { font-style: normal; border-bottom: 2px solid var(--kind); }
td svg { max-width: 16rem; }
.tools { --kind: var(--c0); } .call { --kind: var(--c3); } .result { --kind: var(--c1); } .thoughts { --kind: var(--c5); }
p.key i { margin-left: 1rem; }
p.key mark { background: color-mix(in srgb, var(--c2) 30%, transparent); color: inherit; padding: 0 .3rem; border-radius: 3px; }
p.key mark.light { background: color-mix(in srgb, var(--c4) 30%, transparent); }
ul { margin: 0; padding-left: 1.2rem; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPart:
    """A part of a sample's text, with its kind ("": none), a key of `KINDS`.

    `weight` is that of its tokens in the loss, 0 for what is not trained on.
    """

    text: str
    weight: float
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample to show: its place in the data, its number of tokens, and its parts."""

    place: str
    tokens: int
    parts: tuple[ShownPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSource:
    """A source of the data: its name, its samples, the kept ones, its tokens, and its share of all rows, 0 to 1."""

    name: str
    samples: int
    kept: int
    tokens: int
    trained_tokens: int
    share: float


def samples_page(
    title: str,
    lines: Sequence[str],
    sources: Sequence[ShownSource],
    bins: Sequence[tuple[int, int, int]],
    samples: Sequence[ShownSample],
) -> str:
    """Return the page.

    Args:
        lines: the report on the data.
        bins: the histogram of lengths, as (first, last, count).
    """
    report = "".join(f"<li>{escape(line)}</li>" for line in lines)
    has_light = any(0 < part.weight < 1 for sample in samples for part in sample.parts)
    kinds = {part.kind for sample in samples for part in sample.parts}
    key = "<p class=key>Trained on: <mark>green</mark>"
    key += ", with a weight below 1: <mark class=light>yellow</mark>" if has_light else ""
    key += "".join(f"<i class={kind}>{escape(name)}</i>" for kind, name in KINDS.items() if kind in kinds) + "</p>"
    bars = [(f"{first:,} to {last:,}", count) for first, last, count in bins]
    sections = [
        section("What was read", f"<ul>{report}</ul>", wide=True),
        section("Sources", _sources(sources), wide=True),
        section("Tokens per sample", bar_chart(bars, "samples by their number of tokens"), wide=True),
        section("Samples", key, wide=True) if samples else "",
        *(section(f"{sample.place}: {sample.tokens:,} tokens", _sample(sample), wide=True) for sample in samples),
    ]
    return html_page(title, "What a training sees of its data.", sections, style=_STYLE)


def _sources(sources: Sequence[ShownSource]) -> str:
    """Return a table of the sources, and how the rows are mixed of them."""
    rows = "".join(
        f"<tr><td>{escape(each.name)}</td><td>{each.samples:,}</td><td>{each.kept:,}</td><td>{each.tokens:,}</td>"
        f"<td>{each.trained_tokens:,}</td><td>{_share(each.share)}</td></tr>"
        for each in sources
    )
    names = "".join(f"<th>{name}</th>" for name in ("source", "samples", "kept", "tokens", "trained on", "share of the rows"))
    return f"<div class=scroll><table><tr>{names}</tr>{rows}</table></div>"


def _share(share: float) -> str:
    """Return a bar for a share of 0 to 1, with the share in per cent."""
    return (
        f'<svg viewBox="0 0 200 16" role="img" aria-label="{share:.1%}"><rect class="share" width="{140 * share:.1f}" y="2" '
        f'height="12" rx="2"/><text class="tick" x="{140 * share + 5:.1f}" y="12">{share:.1%}</text></svg>'
    )


def _sample(sample: ShownSample) -> str:
    parts = []
    for part in sample.parts:
        light = f" class=light title='weight {part.weight:g}'" if part.weight < 1 else ""
        text = f"<i class={part.kind}>{escape(part.text)}</i>" if part.kind else escape(part.text)
        parts.append(f"<mark{light}>{text}</mark>" if part.weight else text)
    return f"<pre class=sample>{''.join(parts)}</pre>"
