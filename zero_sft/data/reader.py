"""How samples are read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from zero_sft.data.conversation import ASSISTANT, Passage, Sample
from zero_sft.data.formats import Reading, read_samples
from zero_sft.data.long import TRUNCATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How samples are read: the layout they must have (None: found out), which answers count, what bad and long samples do.

    `train_on`: "all" answers, or the "last" of each sample. `on_bad_sample`: "error", or "skip", with an account in the report.
    `long`: what is longer than the window is "truncate"d, "split" between rounds, or "drop"ped.
    """

    data_format: str | None = None
    train_on: str = "all"
    on_bad_sample: str = "error"
    long: str = TRUNCATE

    @property
    def skips_bad(self) -> bool:
        """Whether a bad sample is left out instead of ending the run."""
        return self.on_bad_sample == "skip"

    def read(self, objects: Iterable[tuple[Any, str]]) -> Reading:
        """The samples that objects are; errors as `read_samples`'."""
        reading = read_samples(objects, self.data_format, skip_bad=self.skips_bad)
        if self.train_on == "last":
            reading = replace(reading, samples=tuple(map(_last_answer_alone, reading.samples)))
        return reading


def _last_answer_alone(sample: Sample) -> Sample:
    """A conversation of whose answers only the last is trained on."""
    if isinstance(sample, Passage):
        return sample
    last = max((number for number, turn in enumerate(sample.turns) if turn.role == ASSISTANT), default=0)
    turns = [turn if number == last else replace(turn, trained=False) for number, turn in enumerate(sample.turns)]
    return replace(sample, turns=tuple(turns))


PLAIN = Reader()
"""A reader with every option as it is by default."""
