"""The frame and the style of a page of HTML, which needs no other file and no script."""

import datetime
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --line: #dfe3ea; --back: #ffffff; --card: #f6f7f9;
  --c0: #2563eb; --c1: #d9480f; --c2: #0f8a5f; --c3: #9333ea; --c4: #b8860b; --c5: #c2255c; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ef; --soft: #9aa4b5; --line: #333c4b; --back: #12161d; --card: #1a2029;
  --c0: #7aa7ff; --c1: #ff9a62; --c2: #4fd1a1; --c3: #c792ff; --c4: #e6bf4b; --c5: #ff7da8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p.soft, .tick { color: var(--soft); fill: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; min-width: 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin-top: 1rem; }
section.wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; display: block; } .tick { font-size: 11px; } .end { text-anchor: end; }
.middle { text-anchor: middle; } .grid { stroke: var(--line); } .mark { stroke: var(--ink); stroke-width: 2; }
polyline { fill: none; stroke-width: 1.8; }
.legend { margin: .25rem 0 0; font-size: 13px; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
td:last-child { min-width: 12rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 40rem; overflow-wrap: break-word; }
@media (max-width: 520px) { .tick { font-size: 15px; } section.wide .tick { font-size: 24px; } body { padding: .75rem; } }
tr.differs td { font-weight: 600; } pre { white-space: pre-wrap; margin: 0; font: inherit; }
"""


def html_page(title: str, summary: str, sections: Sequence[str], *, style: str = "", head: str = "") -> str:
    """Return a page with its sections.

    Args:
        summary: a line below the title.
        style: more rules of style. `head`: more elements of the head.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{head}<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(summary)} Made {now} UTC.</p>'
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, content: str, *, wide: bool = False) -> str:
    """Return a section of a page; "" without content."""
    return f"<section{' class=wide' * wide}><h2>{escape(title)}</h2>{content}</section>" if content else ""
