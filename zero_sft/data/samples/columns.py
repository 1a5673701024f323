"""Read other columns than those of the formats: `--columns prompt=question,completion=answer`. Pure.

The left side is a key of a format, or `role` or `content` of a turn. The right side is the data's key, or a path of keys with
dots between them.
"""

from collections.abc import Mapping
from typing import Any

from zero_sft.errors import ArgumentError, DataError
from zero_sft.printable import excerpt, first_of

TURN_KEYS = ("role", "content")
"""The keys of a turn that may have other names in the data."""

_LISTS_OF_TURNS = ("messages", "conversations", "prompt", "completion")
"""The keys of a sample that may hold turns."""

Columns = tuple[tuple[str, str], ...]
"""Pairs of a format's key and the data's key or path."""


def parse_columns(text: str | None, known: frozenset[str]) -> Columns:
    """Parse the value of `--columns`; `known` are the keys of the formats.

    Raises:
        ArgumentError: not pairs with `=` between them, an unknown key, or a key that is given twice.
    """
    columns = []
    for part in text.split(",") if text else ():
        key, separator, path = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not path or not all(path.split(".")):
            raise ArgumentError(
                f"--columns {text}: expected pairs such as prompt=question,completion=answer; got {part!r}.",
                code="data.bad_columns",
            )
        if key not in known and key not in TURN_KEYS:
            raise ArgumentError(
                f"--columns {text}: unknown key {key!r}; expected one of {', '.join(sorted(known))}, or "
                f"{' or '.join(TURN_KEYS)} of the turns.",
                code="data.unknown_column",
            )
        if key in dict(columns):
            raise ArgumentError(f"--columns {text}: {key} is given twice. Give it once.", code="data.bad_columns")
        columns.append((key, path))
    return tuple(columns)


def rename_columns(sample: Any, columns: Columns, where: str) -> Any:
    """Return the sample with the keys of the formats; keys that were not named stay as they are.

    Raises:
        DataError: a named key is not in the sample.
    """
    if not columns or not isinstance(sample, Mapping):
        return sample
    of_sample = {key: path for key, path in columns if key not in TURN_KEYS}
    renamed = dict(sample)
    values = {key: _value(sample, path, key, where) for key, path in of_sample.items()}
    for path in of_sample.values():
        renamed.pop(path if path in sample else path.split(".")[0], None)
    renamed |= values
    of_turns = {path: key for key, path in columns if key in TURN_KEYS}
    if of_turns:
        for key, value in renamed.items():
            if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value) and key in _LISTS_OF_TURNS:
                renamed[key] = [{of_turns.get(name, name): each for name, each in turn.items()} for turn in value]
    return renamed


def _value(sample: Mapping[str, Any], path: str, key: str, where: str) -> Any:
    """Return the value at a path; a key that has dots in its name comes first."""
    if path in sample:
        return sample[path]
    value: Any = sample
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            found = first_of(map(excerpt, value), 8) if isinstance(value, Mapping) else excerpt(value)
            raise DataError(
                f"{where}: --columns {key}={path}: there is no `{excerpt(step)}`; got {found}.", code="data.column_missing"
            )
        value = value[step]
    return value
