"""List the package's errors and their sentences from its source: `python -m tests.messages` writes `sentences.txt`.

The other tests match an error by its code and the values in it. So a better sentence changes only the source and this list,
which shows all changed sentences side by side.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zero_sft
from zero_sft import errors

SENTENCES = Path(__file__).with_name("sentences.txt")

ROOT = Path(zero_sft.__file__).parent
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
CLASSES |= {"IncompleteCheckpointError"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place that creates an error.

    Attributes:
        code: None if it is not a literal there.
        sentence: the message, with its expressions in braces.
    """

    where: str
    code: str | None
    sentence: str


def sites() -> Iterator[Site]:
    """Find every place in the package that creates an error."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in CLASSES and node.args:
                code = next((each.value for each in node.keywords if each.arg == "code"), None)
                where = f"{path.relative_to(ROOT.parent)}:{node.lineno}"
                if code is None:
                    raise AssertionError(f"{where} makes an error without a code")
                literal = code.value if isinstance(code, ast.Constant) else None
                yield Site(where=where, code=literal, sentence=_text(node.args[0]))


def listed() -> str:
    """Return the content of `sentences.txt`: one line per code and sentence, sorted."""
    lines = {f"{site.code}: {site.sentence}" for site in sites() if site.code is not None}
    return "\n".join(sorted(lines)) + "\n"


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """Return a sentence in which every expression that is not a literal is in braces, as in the source: `{path}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("\n", "\\n")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each) if isinstance(each, ast.Constant) else f"{{{_hole(each)}}}" for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return f"{{{ast.unparse(node)}}}"


def _hole(node: ast.expr) -> str:
    return ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else ast.unparse(node)


if __name__ == "__main__":
    SENTENCES.write_text(listed(), encoding="utf-8")
