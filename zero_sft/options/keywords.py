"""Options as keyword arguments of a function: sorted into their dataclasses, checked, shown in the function's signature."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.spec import SECRETS, OptionSpec, specs_of


def read_keywords(keywords: Mapping[str, Any], *groups: type, function: Callable[..., Any]) -> list[Any]:
    """Sort keyword arguments into objects of the dataclasses `groups`, in their order; `function` took them.

    Raises:
        ArgumentError: a name that no group has, with the nearest known one; a value of another type.
    """
    fields = {group: [field.name for field in dataclasses.fields(group)] for group in groups}
    known = {name: None for names in fields.values() for name in names}
    parameters = inspect.signature(function).parameters.values()
    named = dict.fromkeys(param.name for param in parameters if param.kind is inspect.Parameter.KEYWORD_ONLY)
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, named | known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ArgumentError(
                f"unknown argument {name!r}.{hint} Known: {', '.join(named | known)}.", code="arguments.unknown"
            )
    return [group(**{name: keywords[name] for name in names if name in keywords}) for group, names in fields.items()]


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
        setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - functions have it unasked
        return function

    return decorate


def require_types(options: object, group: type) -> None:
    """Raise `ArgumentError` unless each field of `group` that `options` holds has a value of its type.

    Nothing is converted: a text that looks like a flag ("False" from a command line) would count as True.
    """
    for name, spec in _cached_specs(group).items():
        value = getattr(options, name)
        if not spec.accepts(value):
            shown = "another value, which is not shown" if name in SECRETS else f"{value!r:.80}"
            raise ArgumentError(f"{name} must be {spec.expected}, got {shown}", code="arguments.wrong_value")


@functools.cache
def _cached_specs(group: type) -> dict[str, OptionSpec]:
    return specs_of(group, "")
