"""Report on the data for the log: the samples and tokens that are kept, dropped or cut."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

from zero_sft.data.samples.conversation import LEADING, UNANSWERED
from zero_sft.printable import excerpt, first_of, with_count

NO_ANSWER = "without an answer to train on"
CUT_OFF = "cut off before the first answer"
TOO_LONG = "longer than --model_max_length"
"""Reasons for which a sample, or a part of a split sample, is dropped."""

MOST_SHOWN = 3
"""The number of skipped samples whose errors are shown."""

MOST_KEYS_SHOWN = 20

MOST_PLACES = 20
"""The number of dropped samples whose places are kept, for each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The report on a file or folder, or on a batch of it. With lazy tokenising, the token counts are None.

    - `left_out`: files of a folder that are not data. `note`: a line on the folder's splits. `formats`: names of the formats.
    - `samples`: all samples. They include the `bad` ones, which were skipped, and those that were `split`.
    - `first_bad`: errors of the first few bad samples. `dropped_parts`: parts of split samples that were dropped, by reason.
    - `kept`: rows. `turns`: turns of the kept samples, without system texts. `dropped`: samples without a kept row, by reason.
    - `dropped_places`: the places of the first few dropped samples, by reason.
    - `unread_keys`: for each key that was not read, the number of samples. `dropped_turns`: dropped turns, by reason.
    - `changes`: what the options have changed in the samples, and what looks wrong, by description, which begins with a plural.
    - `weighted`: kept rows with weights other than 0 and 1.
    - `has_trained`: something is trained on in at least one sample; lazy tokenising finds this as well.
    - `highest_id`: the highest id of samples that were tokenised already, None without any.
    - `shortest` sample and `longest` kept row: in tokens, before truncation.
    """

    file: str = ""
    template: str = ""
    left_out: tuple[str, ...] = ()
    note: str = ""
    formats: tuple[str, ...] = ()
    samples: int = 0
    kept: int = 0
    turns: int = 0
    split: int = 0
    bad: int = 0
    first_bad: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dropped_parts: Mapping[str, int] = field(default_factory=dict)
    unread_keys: Mapping[str, int] = field(default_factory=dict)
    dropped_turns: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, int] = field(default_factory=dict)
    empty_answers: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None
    thoughts: int | None = None
    dropped_thoughts: int | None = None
    cut_samples: int | None = None
    cut_tokens: int | None = None
    cut_trained_tokens: int | None = None
    weighted: int = 0
    has_trained: bool = False
    shortest: int | None = None
    longest: int | None = None
    highest_id: int | None = None

    def lines(self) -> list[str]:
        """Format the report for the log: the totals, then a line for each kind of thing that was left out, if any."""
        samples, turns = with_count(self.samples, "sample"), with_count(self.turns, "turn")
        source = f"format {' and '.join(self.formats)}, template {self.template}"
        lines = [f"{self.file}: {self.kept:,} {'from' if self.split else 'of'} {samples}, {turns} ({source})"]
        if self.note:
            lines.append(self.note)
        if self.left_out:
            shown = first_of(map(excerpt, self.left_out))
            lines.append(f"{with_count(len(self.left_out), 'other file')} in it left out: {shown}")
        if self.unread_keys:
            lines.append(_unread_line(self.unread_keys))
        if self.split:
            lines.append(f"{with_count(self.split, 'sample')} longer than --model_max_length, split between rounds")
        if any(self.dropped_parts.values()):
            lines.append("parts of split samples dropped: " + list_counts(self.dropped_parts))
        if self.tokens is None:
            lines.append(
                "tokenised when they are needed: how many tokens they have, which are cut off, and which thoughts the template "
                "leaves out, is not known"
            )
        else:
            lines.append(f"{with_count(self.tokens, 'token')}, {self.trained_tokens:,} of them trained on")
        return lines + self._dropped_lines()

    def _dropped_lines(self) -> list[str]:
        """Format a line for each kind of sample, turn or text that is skipped, dropped or cut, if any."""
        lines = []
        if self.bad:
            lines += [f"{with_count(self.bad, 'bad sample')} skipped, such as", *(f"  {message}" for message in self.first_bad)]
        if self.dropped:
            lines.append("samples dropped: " + list_counts(self.dropped))
        if self.cut_samples:
            cut = with_count(self.cut_samples, "row" if self.split else "sample")
            lines.append(
                f"{cut} longer than --model_max_length, the longest {self.longest:,} tokens: "
                f"{with_count(self.cut_tokens or 0, 'token')} cut off, {self.cut_trained_tokens:,} of them answers"
            )
        if any(self.dropped_turns.values()):
            turns = {reason: self.dropped_turns.get(reason, 0) for reason in (LEADING, UNANSWERED)}
            lines.append("turns dropped: " + list_counts(turns))
        if self.weighted:
            lines.append(f"{with_count(self.weighted, 'row')} with weights other than 0 and 1")
        lines += [_change_line(what, count) for what, count in self.changes.items() if count]
        if self.dropped_thoughts:
            lines.append(
                f"the template leaves out the thoughts of {with_count(self.dropped_thoughts, 'answer')}, of {self.thoughts:,} "
                "that have some"
            )
        if self.empty_answers:
            lines.append(f"{with_count(self.empty_answers, 'empty answer')}, not trained on")
        return lines

    @property
    def untrained(self) -> dict[str, int]:
        """The numbers of samples that were dropped because nothing in them is trained on, by reason."""
        return {reason: count for reason, count in self.dropped.items() if reason != TOO_LONG}

    @property
    def untrained_share(self) -> float:
        """The share of usable samples, 0 to 1, that are `untrained`."""
        usable = self.samples - self.bad
        return sum(self.untrained.values()) / usable if usable else 0.0


_MERGED: Mapping[str, Callable[[list[Any]], Any]] = {
    "formats": lambda values: tuple(sorted({*chain.from_iterable(values)})),
    "dropped_places": lambda values: {
        reason: list(chain.from_iterable(value.get(reason, ()) for value in values))[:MOST_PLACES]
        for reason in dict.fromkeys(chain.from_iterable(values))
    },
    "first_bad": lambda values: tuple(chain.from_iterable(values))[:MOST_SHOWN],
    "has_trained": any,
    "shortest": min,
    "longest": max,
    "highest_id": max,
}
"""The fields of a report that are neither summed nor the same in all batches, and how the values of batches are merged."""


def total(reports: Sequence[DataReport]) -> DataReport:
    """Sum the reports of all batches of a source; there must be at least one."""
    merged = {}
    for name in (item.name for item in fields(DataReport)):
        values = [value for report in reports if (value := getattr(report, name)) is not None]
        if name in _MERGED and values:
            merged[name] = _MERGED[name](values)
        elif values and isinstance(values[0], Mapping):
            merged[name] = dict(sum(map(Counter, values), Counter()))
        elif values and isinstance(values[0], int):
            merged[name] = sum(values)
    return replace(reports[0], **merged)


def _change_line(what: str, count: int) -> str:
    """Format a count with its description, which begins with a plural: "calls of ...", 1 → "1 call of ..."."""
    noun, _, rest = what.partition(" ")
    return f"{with_count(count, noun.removesuffix('s'))} {rest}"


def _unread_line(unread_keys: Mapping[str, int]) -> str:
    """Format the keys that were not read, the most frequent first.

    Worked example: {"id": 3, "note": 1} → "keys that are not read: id (3 samples), note (1 sample)".
    """
    shown = [f"{excerpt(key)} ({with_count(count, 'sample')})" for key, count in Counter(unread_keys).most_common()]
    return f"keys that are not read: {first_of(shown, MOST_KEYS_SHOWN)}"


def list_counts(counts: Mapping[str, int]) -> str:
    """Format counts by reason, without those that are 0."""
    return "; ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
