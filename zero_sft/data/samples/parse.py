"""Parse objects of a file into samples, and count the turns, keys and objects that are left out. Pure."""

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
    """Samples in order, the names of their formats, and the error messages of skipped objects (`bad`).

    `dropped_turns` counts dropped turns by reason; `unread_keys` counts the samples that have a key that was not read, by key.
    """

    samples: tuple[Sample, ...]
    formats: tuple[str, ...]
    bad: tuple[str, ...] = ()
    dropped_turns: Mapping[str, int] = field(default_factory=dict)
    unread_keys: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParser:
    """Options for reading samples.

    Args:
        data_format: the format that all samples must have, see `sample_formats`; None detects it for each sample.
        train_on: "all" answers, or only the "last" of each sample.
        on_bad_sample: "error", or "skip", which reports the skipped samples.
        overlong: "truncate", "split" between rounds or "drop" samples longer than the window; applied after tokenising.
    """

    data_format: str | None = None
    train_on: str = "all"
    on_bad_sample: str = "error"
    overlong: str = TRUNCATE

    @property
    def skips_bad(self) -> bool:
        """Whether a bad sample is skipped instead of ending the run."""
        return self.on_bad_sample == "skip"

    def read(self, objects: Iterable[tuple[Any, str]]) -> ParsedSamples:
        """Parse objects, each with its place for messages, into samples.

        Raises:
            DataError: a line that is not JSON, or an object that is not a valid sample, unless bad samples are skipped.
        """
        samples, formats, bad, dropped_turns, unread_keys = [], set[str](), [], Counter[str](), Counter[str]()
        for raw, where in objects:
            try:
                format_name, parsed = self._parse(raw, where)
            except DataError as error:
                if not self.skips_bad:
                    raise
                bad.append(str(error))
                continue
            samples.append(_train_on_last_answer(parsed.sample) if self.train_on == "last" else parsed.sample)
            formats.add(format_name)
            dropped_turns.update(parsed.dropped_turns)
            unread_keys.update(parsed.unread_keys)
        return ParsedSamples(
            samples=tuple(samples),
            formats=tuple(sorted(formats)),
            bad=tuple(bad),
            dropped_turns=dict(dropped_turns),
            unread_keys=dict(unread_keys),
        )

    def _parse(self, raw: Any, where: str) -> tuple[str, ParsedSample]:
        """Parse one object; return the name of its format as well."""
        if isinstance(raw, BadLine):
            raise DataError(raw.message, code=raw.code)
        return read_sample(raw, where, self.data_format)


def _train_on_last_answer(sample: Sample) -> Sample:
    """Mark only the last answer of a conversation as trained on."""
    if isinstance(sample, PromptCompletion):
        return sample
    last = max((number for number, turn in enumerate(sample.turns) if turn.role == ASSISTANT), default=0)
    turns = [turn if number == last else replace(turn, left_out_of_loss=True) for number, turn in enumerate(sample.turns)]
    return replace(sample, turns=tuple(turns))


DEFAULT_PARSER = SampleParser()
"""A parser with all options at their defaults."""
