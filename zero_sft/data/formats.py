"""From objects to samples, and an account of what was dropped or skipped on the way."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zero_sft.data.conversation import Sample
from zero_sft.data.files import BadLine
from zero_sft.data.layouts import read_sample
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Samples in order, the layouts they were found in, what was dropped, and why objects were skipped.

    `unread`: keys that were not read, and in how many samples.
    """

    samples: tuple[Sample, ...]
    layouts: tuple[str, ...]
    leading_turns: int = 0
    unanswered_turns: int = 0
    bad: tuple[str, ...] = ()
    unread: Mapping[str, int] = field(default_factory=dict)


def read_samples(objects: Iterable[tuple[Any, str]], data_format: str | None = None, skip_bad: bool = False) -> Reading:
    """The samples that objects are, each given with its place. Pure.

    Args:
        data_format: the layout that every sample must have, see `layouts`; None finds it out, sample by sample.
        skip_bad: leave out what can't be used, with its error among `bad`, instead of raising it.

    Raises:
        DataError: a line that is not JSON, or an object that is no sample; with the place and the remedy.
    """
    samples, layouts, bad, leading, unanswered, unread = [], set(), [], 0, 0, Counter[str]()
    for raw, where in objects:
        try:
            if isinstance(raw, BadLine):
                raise raw
            layout, found = read_sample(raw, where, data_format)
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
            continue
        layouts.add(layout)
        leading += found.leading
        unanswered += found.unanswered
        unread.update(found.unread)
        samples.append(found.sample)
    return Reading(
        samples=tuple(samples),
        layouts=tuple(sorted(layouts)),
        leading_turns=leading,
        unanswered_turns=unanswered,
        bad=tuple(bad),
        unread=dict(unread),
    )
