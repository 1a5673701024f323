"""Match errors by their codes: a sentence may change, but not its code and the values in it."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from zero_sft.errors import ZeroSftError


@contextlib.contextmanager
def raises(code: str, *values: str) -> Iterator[Any]:
    """Expect an error that has `code`, or that lists a problem with `code`, and has all `values` in its message."""
    with pytest.raises(ZeroSftError) as caught:
        yield caught
    message = str(caught.value)
    assert code in caught.value.codes, f"{caught.value.codes}: {message}"
    for value in values:
        assert value in message, message


def error_codes(output: str) -> list[str]:
    """Return the codes of the `error:` lines in a job's output, and of the problems that they list."""
    return re.findall(r"\[([a-z_]+\.[a-z0-9_]+)\]$", output, re.MULTILINE)
