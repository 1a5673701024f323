"""Parse objects of a file into samples, and count the turns, keys and objects that are left out. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zero_sft.data.samples.assemble import DEFAULT_OPTIONS, ParsedSample, ReadOptions
from zero_sft.data.samples.conversation import ASSISTANT, Conversation, Sample
from zero_sft.data.samples.sample_formats import read_sample
from zero_sft.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSamples:
    """Samples in order, the names of their formats, and the error messages of skipped objects (`bad`).

    `dropped_turns` counts dropped turns by reason; `unread_keys` counts the samples that have a key that was not read, by key;
    `changes` is as in `ParsedSample`.
    """

    samples: tuple[Sample, ...]
    formats: tuple[str, ...]
    bad: list[str]
    dropped_turns: Mapping[str, int]
    unread_keys: Mapping[str, int]
    changes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParser:
    """Options for reading samples.

    Args:
        options: how an object is read.
        train_on: "all" answers, or only the "last" of each sample.
        on_bad_sample: "error", or "skip", which reports the skipped samples.
    """

    options: ReadOptions = DEFAULT_OPTIONS
    train_on: str = "all"
    on_bad_sample: str = "error"

    @property
    def skips_bad(self) -> bool:
        """Whether a bad sample is skipped instead of ending the run."""
        return self.on_bad_sample == "skip"

    def read(self, objects: Iterable[tuple[Any, str]]) -> ParsedSamples:
        """Parse objects, each with its place for messages, into samples.

        Raises:
            DataError: a line that is not JSON, or an object that is not a valid sample, unless bad samples are skipped.
        """
        parsed, bad = apply_to_usable(self._parse, objects, skip_bad=self.skips_bad)
        samples = (sample.sample for _, sample in parsed)
        return ParsedSamples(
            samples=tuple(map(_train_on_last_answer, samples) if self.train_on == "last" else samples),
            formats=tuple(sorted({format_name for format_name, _ in parsed})),
            bad=bad,
            dropped_turns=sum((sample.dropped_turns for _, sample in parsed), Counter[str]()),
            unread_keys=Counter(key for _, sample in parsed for key in sample.unread_keys),
            changes=sum((sample.changes for _, sample in parsed), Counter[str]()),
        )

    def _parse(self, located: tuple[Any, str]) -> tuple[str, ParsedSample]:
        """Parse one object with its place; return the name of its format as well."""
        raw, where = located
        if isinstance(raw, DataError):  # of a line that is not JSON
            raise raw
        return read_sample(raw, where, self.options)


def apply_to_usable(
    function: Callable[[Item], Result], items: Iterable[Item], *, skip_bad: bool
) -> tuple[list[Result], list[str]]:
    """Apply a function to each item; return the results, and the messages of the `DataError`s that were skipped.

    Raises:
        DataError: the first one that the function raises, without `skip_bad`.
    """
    results, bad = [], []
    for item in items:
        try:
            results.append(function(item))
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
    return results, bad


def _train_on_last_answer(sample: Sample) -> Sample:
    """Leave all answers of a conversation but the last one out of the loss."""
    if not isinstance(sample, Conversation):
        return sample
    last = max((number for number, turn in enumerate(sample.turns) if turn.role == ASSISTANT), default=0)
    turns = [turn if number == last else replace(turn, weight=0.0) for number, turn in enumerate(sample.turns)]
    return replace(sample, turns=tuple(turns))


DEFAULT_PARSER = SampleParser()
