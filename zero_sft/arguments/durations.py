"""Durations as SLURM writes them: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

import re

from zero_sft.errors import ArgumentError

_FORM = re.compile(r"(?:(?P<days>[0-9]{1,6})-)?(?P<parts>[0-9]{1,9}(?::[0-9]{1,9}){0,2})")


def parse_duration(name: str, text: str) -> float:
    """Return the seconds of a duration. Worked example: "3:50:00" is 13800, "30" is 1800, "1-12" is 129600.

    Args:
        name: the argument's name, for the error.

    Raises:
        ArgumentError: it has another form, or is 0.
    """
    found = _FORM.fullmatch(text.strip())
    if found is not None:
        days, parts = int(found["days"] or 0), [int(part) for part in found["parts"].split(":")]
        if found["days"] is not None:
            hours, minutes, seconds = (parts + [0, 0])[:3]
        else:
            hours, minutes, seconds = [0, parts[0], 0] if len(parts) == 1 else ([0, *parts])[-3:]
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if total > 0:
            return float(total)
    raise ArgumentError(
        f"--{name} {text!s:.40} is not a duration as SLURM writes it: minutes, hours:minutes:seconds, or "
        "days-hours:minutes:seconds. 3:50:00 is three hours and fifty minutes.",
        code="arguments.bad_duration",
    )
