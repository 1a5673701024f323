"""Mark single cases of a parametrized test as slow: `make test` omits them, `make test-all` runs them."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One slow case."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_except(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All `cases`; those that are not in `quick` are slow. A case is a value or a tuple of values."""
    return [case if case in quick else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases]
