"""From a path to samples, and an account of what was dropped or skipped on the way."""

from dataclasses import dataclass
from pathlib import Path

from zero_sft.data.conversation import Sample
from zero_sft.data.files import BadLine, files_of, read_objects
from zero_sft.data.layouts import EXPECTED, read_sample
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a path holds: samples in order, the layouts they were found in, what was dropped, and why samples were skipped."""

    samples: tuple[Sample, ...]
    layouts: tuple[str, ...]
    leading_turns: int = 0
    unanswered_turns: int = 0
    bad: tuple[str, ...] = ()


def read_samples(path: Path, data_format: str | None = None, skip_bad: bool = False) -> Reading:
    """Read all samples of a file or a folder. Any rank by itself; does not communicate.

    Args:
        data_format: the layout that every sample must have, see `layouts`; None finds it out, sample by sample.
        skip_bad: leave a sample or a line that can't be used out, with its error among `bad`, instead of raising it.

    Raises:
        DataError: no such file, nothing in it, not JSON, or a sample that is none; with the place and the remedy.
    """
    samples, layouts, bad, leading, unanswered = [], set(), [], 0, 0
    for file in files_of(path):
        for raw, where in read_objects(file):
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
            samples.append(found.sample)
    if not samples:
        skipped = f" but {len(bad)} that can't be used, the first: {bad[0]}" if bad else ""
        raise DataError(f"{path} holds no samples{skipped}. Expected {EXPECTED}.")
    return Reading(
        samples=tuple(samples),
        layouts=tuple(sorted(layouts)),
        leading_turns=leading,
        unanswered_turns=unanswered,
        bad=tuple(bad),
    )
