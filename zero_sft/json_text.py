"""Parse JSON that a user wrote, and explain every fault of it in one clause.

`json` silently keeps the last of two equal keys, raises RecursionError for deep nesting, and explains a long number with a
Python function. The callers add the file, and raise an error of their topic.
"""

import json
from collections.abc import Callable
from typing import Any

from zero_sft.printable import excerpt


class JsonError(ValueError):
    """JSON that can't be used; `str` gives the reason.

    Attributes:
        position: the index of the character at fault; None if the reason names what is wrong instead.
        is_open_string: whether the text ends within a string, which begins at `position`.
    """

    def __init__(self, reason: str, text: str = "", position: int | None = None) -> None:
        super().__init__(reason)
        self.position = position
        self.is_open_string = reason.startswith("unterminated string")
        self.line = 1 if position is None else text.count("\n", 0, position) + 1
        self.column = 1 if position is None else position - text.rfind("\n", 0, position)

    @property
    def place_and_reason(self) -> str:
        """The reason, after the line and column if they are known: "line 3, column 5: expecting value"."""
        return str(self) if self.position is None else f"line {self.line}, column {self.column}: {self}"


class DuplicateKeyError(JsonError):
    """An object with the same key twice."""


class NestingError(JsonError):
    """Lists or objects that are nested thousands of levels deep."""


def parse_json(text: str) -> Any:
    """Parse JSON, in which a key stands at most once in each object.

    Raises:
        JsonError: the text is not JSON, or Python can't hold it.
    """
    return _parse(json.loads, text, object_pairs_hook=_without_duplicate_keys)


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """Parse the JSON value at `start`; return it, and the index of the character after it. Raises as `parse_json` does."""
    return _parse(_DECODER.raw_decode, text, start)


def _parse(parser: Callable[..., Any], text: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return parser(text, *args, **kwargs)
    except json.JSONDecodeError as error:
        raise JsonError(_reason(error), text, error.pos) from error
    except RecursionError as error:
        raise NestingError("it is nested too deeply") from error
    except JsonError:
        raise
    except ValueError as error:  # CPython converts integers of at most 4,300 digits
        raise JsonError("it holds an integer of thousands of digits; write it as text, in quotes") from error


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of an object; `json` would silently keep the last of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {excerpt(repr(duplicate))} is given twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicate_keys)


def _reason(error: json.JSONDecodeError) -> str:
    """Return what is wrong, with the rule of JSON that a config copied from another language often breaks."""
    rest, before = error.doc[error.pos :], error.doc[: error.pos].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments; remove this one"
    if (rest[:1] in "}]" and before.endswith(",")) or "trailing comma" in error.msg:
        return "JSON has no comma after the last item; remove it"
    message = error.msg.removesuffix(" at").removesuffix(":")
    return message[:1].lower() + message[1:]
