"""Accept options as keyword arguments: sort them into dataclasses, check them, and show them in signatures."""

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from zero_sft.errors import ArgumentError
from zero_sft.options.spec import SECRETS, specs_of

Options = TypeVar("Options")


def read_keywords(keywords: Mapping[str, Any], *groups: type, function: Callable[..., Any]) -> list[Any]:
    """Sort the keyword arguments of a `function` that `takes_options` of `groups` into one object for each group.

    Raises:
        ArgumentError: a name that no group has, with the nearest known name; a value of a wrong type.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [param.name for param in parameters if param.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ArgumentError(f"unknown argument {name!r}.{hint} Known: {', '.join(known)}.", code="arguments.unknown")
    return [pick_options(group, SimpleNamespace(**keywords)) for group in groups]


def pick_options(group: type[Options], source: object) -> Options:
    """Make an object of the dataclass `group` from those of its fields that `source` has as attributes."""
    names = [field.name for field in dataclasses.fields(group) if hasattr(source, field.name)]  # type: ignore[arg-type]
    return group(**{name: getattr(source, name) for name in names})


def takes_options(*groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that its signature shows the options of `groups` in place of its `**keywords`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        parameters = [param for param in signature.parameters.values() if param.kind is not inspect.Parameter.VAR_KEYWORD]
        for group in groups:
            parameters += [
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
                for field in dataclasses.fields(group)
            ]
        setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - type checkers don't know this attribute
        return function

    return decorate


def require_types(options: object, group: type) -> None:
    """Raise `ArgumentError` unless `options` has, for each field of `group`, a value of the field's type.

    Values are not converted: the text "False" would count as True.
    """
    for name, spec in specs_of(group).items():
        value = getattr(options, name)
        if not spec.accepts(value):
            shown = "another value (not shown)" if name in SECRETS else f"{value!r:.80}"
            raise ArgumentError(f"{name} must be {spec.expected}, got {shown}", code="arguments.wrong_value")


def require_path(name: str, value: object, expected: str) -> str:
    """Return a path as text; raise `ArgumentError` unless `value` is text or a path, without null characters."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise wrong_value(name, value, expected)
    if "\0" in text:
        raise wrong_value(name, value, f"{expected}, without null characters")
    return text


def require_instance(name: str, value: object, kind: type, expected: str) -> None:
    """Raise `ArgumentError` unless `value` is None or an instance of `kind`."""
    if value is not None and not isinstance(value, kind):
        raise wrong_value(name, value, expected)


def wrong_value(name: str, value: object, expected: str) -> ArgumentError:
    """Make the error of an argument that has another type or value than expected."""
    return ArgumentError(f"{name} must be {expected}, got {value!r:.80}", code="arguments.wrong_value")
