"""Tests that private names of transformers and TRL are used only in the two modules that list them."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import zero_sft
from zero_sft.job import trainer_internals

PACKAGE = Path(zero_sft.__file__).parent
LISTS = {"transformers_internals.py", "job/trainer_internals.py"}

_DEFINED = re.compile(r"(?:def |class |self\.|cls\.)(_[a-zA-Z]\w*)|^ *(_[A-Za-z]\w*)\s*[:=]", re.MULTILINE)
_TORCHS = {"_parameters", "_buffers", "_modules", "_last_lr"}
"""Names of torch that transformers also uses."""


def private_names_of(*libraries: str) -> set[str]:
    names = set()
    for library in libraries:
        spec = importlib.util.find_spec(library)
        assert spec is not None
        assert spec.origin is not None
        for path in Path(spec.origin).parent.rglob("*.py"):
            if "/models/" not in str(path) or "/models/auto/" in str(path):
                names |= {one or other for one, other in _DEFINED.findall(path.read_text(errors="ignore"))}
    return {name for name in names if not name.startswith("__")} - _TORCHS


def uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of imports from the libraries, attributes of objects other than `self`, and strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "trl"):
            yield from ((node.lineno, alias.name) for alias in node.names)


def own_names(source: str) -> set[str]:
    """Return the names that a module defines: functions, classes, and private attributes of its objects."""
    tree = ast.parse(source)
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | set(re.findall(r"self\.(_\w+)(?:: [^=\n]+)? = ", source))


def found_in(source: str, private: set[str]) -> list[tuple[int, str]]:
    own = own_names(source)
    return [(line, name) for line, name in uses(source) if name in private and name not in own]


@pytest.fixture(scope="module")
def private() -> set[str]:
    return private_names_of("transformers", "trl")


def test_private_names_are_in_the_lists_alone(private):
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if str(path.relative_to(PACKAGE)) not in LISTS:
            names = found_in(path.read_text(encoding="utf-8"), private)
            found += [f"{path.relative_to(PACKAGE)}:{line} {name}" for line, name in names if not _is_listed(path, name)]
    assert not found


def _is_listed(path: Path, name: str) -> bool:
    """Allow `super()._x()` if `_x` is listed as overridden, and names that `internal` looks up in the list."""
    if name in trainer_internals.OVERRIDDEN:
        return path.is_relative_to(PACKAGE / "job")
    return f'internal("{name}")' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    ["model._keys_to_ignore_on_save", "getattr(model, '_keys_to_ignore_on_save')", "from trl.trainer.utils import _metrics"],
)
def test_the_scan_sees_one(private, source):
    assert found_in(source, private)


def test_methods_that_override_private_ones_are_listed(private):
    """A private method of a trainer class with a name that the library uses would override it silently."""
    for path in (PACKAGE / "job").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                assert {name for name in methods if name in private} <= {*trainer_internals.OVERRIDDEN}, path


def test_a_moved_trainer_internal_is_named(monkeypatch):
    from trl import SFTTrainer

    from tests.errors import raises

    trainer_internals.require(SFTTrainer, trainer_internals.OVERRIDDEN)
    monkeypatch.delattr(SFTTrainer, "prediction_step")
    monkeypatch.delattr(SFTTrainer.__mro__[2], "prediction_step", raising=False)
    with raises("version.trainer_moved", "prediction_step"):
        trainer_internals.require(SFTTrainer, trainer_internals.OVERRIDDEN)
    with raises("version.trainer_moved", "_metrics"):
        trainer_internals.require(object(), trainer_internals.SET)
