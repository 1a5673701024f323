"""Errors by their codes, as the tests name them: a sentence may change, its code and the values in it may not."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from zero_sft.errors import ZeroSftError


@contextlib.contextmanager
def raises(code: str, *values: str) -> Iterator[Any]:
    """Expect an error with that code, or a list of problems one of which has it, and with `values` in its message."""
    with pytest.raises(ZeroSftError) as caught:
        yield caught
    message = str(caught.value)
    assert code in caught.value.codes, f"{caught.value.codes}: {message}"
    for value in values:
        assert value in message, message


def error_codes(output: str) -> list[str]:
    """The codes of the `error:` lines and of the problems that they list, in what a job has printed."""
    return re.findall(r"\[([a-z_]+\.[a-z0-9_]+)\]$", output, re.MULTILINE)
