"""Check the patterns by which parameters are chosen: `--unfreeze` and `--learning_rates`. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zero_sft.errors import ArgumentError


def unusable_patterns(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each pattern and rate that can't be used. Pure."""
    rates = values.get("learning_rates") or {}
    if values.get("unfreeze") is not None and (values.get("lora_r") is not None or values.get("lora_weight_path") is not None):
        yield ArgumentError(
            "--unfreeze trains weights of the base model, which an adapter does not hold: with LoRA, name whole modules with "
            "--lora_modules_to_save",
            code="arguments.contradiction",
        )
    targets = values.get("lora_target_modules") or []
    targets = targets if len(targets) == 1 else []  # several are names, not expressions
    options = (("unfreeze", [values.get("unfreeze")]), ("learning_rates", list(rates)), ("lora_target_modules", targets))
    for option, patterns in options:
        for pattern in filter(None, patterns):
            try:
                re.compile(pattern)
            except re.error as error:
                yield ArgumentError(
                    f"--{option}: {pattern!r} is not a regular expression: {error}", code="arguments.bad_pattern"
                )
    for pattern, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1e6:
            yield ArgumentError(
                f"--learning_rates: the rate of {pattern!r} must be a number, at least 0; got {rate!r}",
                code="arguments.out_of_range",
            )
