"""Links from the README and other pages: each leads to a file of the repository, and to a heading in it.

The pages of docs/ are also checked by `make docs`, which does not see the README.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def links_of(text):
    """The targets of a page's links and pictures, without those in code and those to other servers."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    targets = ["".join(groups) for groups in _LINK.findall(prose)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors_of(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    """The links of a page that lead nowhere."""
    broken = []
    for target in links_of(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_the_check_sees_broken_links(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[good](#a-title) [no file](gone.md) [no heading](page.md#b) `[code](x)` [far](https://x.y/z)\n")
    assert broken_links(page) == ["gone.md", "page.md#b"]


def test_the_example_is_a_file_of_arguments(monkeypatch):
    from zero_sft.arguments import parse

    monkeypatch.chdir(ROOT)
    parsed = parse(["examples/train.yaml"])
    assert Path(parsed.data.training_path).is_file()
    assert not parsed.notes
