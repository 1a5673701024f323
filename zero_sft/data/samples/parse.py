"""From objects of a file to samples, and an account of what was dropped or skipped on the way. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, PromptCompletion, Sample
from zero_sft.data.samples.overlong import TRUNCATE
from zero_sft.data.samples.sample_formats import ParsedSample, read_sample
from zero_sft.data.sources.local_files import BadLine
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSamples:
    """Samples in order, the layouts they were found in, and the errors of the objects that were skipped.

    `dropped_turns`: how many turns were dropped, and why. `unread`: keys that were not read, and in how many samples.
    """

    samples: tuple[Sample, ...]
    layouts: tuple[str, ...]
    bad: tuple[str, ...] = ()
    dropped_turns: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParser:
    """How samples are read: the layout they must have (None: found out), which answers count, what bad and long samples do.

    `data_format`: see `layouts`; None finds it out, sample by sample. `train_on`: "all" answers, or the "last" of each sample.
    `on_bad_sample`: "error", or "skip", with an account in the report. `long`: what is longer than the window is "truncate"d,
    "split" between rounds, or "drop"ped, once it is tokenised.
    """

    data_format: str | None = None
    train_on: str = "all"
    on_bad_sample: str = "error"
    overlong: str = TRUNCATE

    @property
    def skips_bad(self) -> bool:
        """Whether a bad sample is left out instead of ending the run."""
        return self.on_bad_sample == "skip"

    def read(self, objects: Iterable[tuple[Any, str]]) -> ParsedSamples:
        """Parse objects, each given with its place, into samples.

        Raises:
            DataError: a line that is not JSON, or an object that is no sample, unless such are skipped; with the place and the
                remedy.
        """
        samples, layouts, bad, dropped_turns, unread = [], set[str](), [], Counter[str](), Counter[str]()
        for raw, where in objects:
            try:
                layout, parsed = self._parsed(raw, where)
            except DataError as error:
                if not self.skips_bad:
                    raise
                bad.append(str(error))
                continue
            samples.append(_last_answer_alone(parsed.sample) if self.train_on == "last" else parsed.sample)
            layouts.add(layout)
            dropped_turns.update(parsed.dropped_turns)
            unread.update(parsed.unread)
        return ParsedSamples(
            samples=tuple(samples),
            layouts=tuple(sorted(layouts)),
            bad=tuple(bad),
            dropped_turns=dict(dropped_turns),
            unread=dict(unread),
        )

    def _parsed(self, raw: Any, where: str) -> tuple[str, ParsedSample]:
        """The name of an object's layout, and the sample that it is."""
        if isinstance(raw, BadLine):
            raise DataError(raw.message, code=raw.code)
        return read_sample(raw, where, self.data_format)


def _last_answer_alone(sample: Sample) -> Sample:
    """A conversation of whose answers only the last is trained on."""
    if isinstance(sample, PromptCompletion):
        return sample
    last = max((number for number, turn in enumerate(sample.turns) if turn.role == ASSISTANT), default=0)
    turns = [turn if number == last else replace(turn, trained=False) for number, turn in enumerate(sample.turns)]
    return replace(sample, turns=tuple(turns))


PLAIN = SampleParser()
"""A reader with every option as it is by default."""
