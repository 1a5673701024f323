"""What became of the data: an account for the log."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from zero_sft.data.samples.conversation import LEADING, UNANSWERED
from zero_sft.printable import on_one_line

MOST_SHOWN = 3
"""Errors of skipped samples that are shown."""

MOST_KEYS_SHOWN = 20

_COUNTED = ("dropped", "lost", "unread", "dropped_turns")
"""Fields of a report that count by reason or key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file or folder, or of a part of it. What only tokenising shows is None where that is put off, but for
    `has_trained`: whether anything is trained on in one of the samples.

    `bad` samples were skipped, the first few with the errors `first_bad`; they count among `samples`, as does a sample that was
    `split`, of whose parts some may be `lost`. `dropped` are samples of which nothing is kept, and `turns`, system texts apart,
    those of the others. `shortest` is the least length of a sample, `longest` the greatest of a kept row, in tokens, before
    they are cut. `left_out` are files of a folder that are not data, and `note` is a line on its splits. `unread` are keys that
    were not read, and in how many samples; `dropped_turns`, how many turns were dropped, and why.
    """

    file: str
    template: str
    left_out: tuple[str, ...] = ()
    note: str = ""
    layouts: tuple[str, ...] = ()
    samples: int = 0
    kept: int = 0
    turns: int = 0
    split: int = 0
    bad: int = 0
    first_bad: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    dropped_turns: Mapping[str, int] = field(default_factory=dict)
    empty_answers: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None
    thoughts: int | None = None
    dropped_thoughts: int | None = None
    cut_samples: int | None = None
    cut_tokens: int | None = None
    cut_trained_tokens: int | None = None
    has_trained: bool = True
    shortest: int | None = None
    longest: int | None = None

    def lines(self) -> list[str]:
        """The report for the log: what there is, then only what was left out."""
        found = f"format {' and '.join(self.layouts)}, template {self.template}"
        of = "from" if self.split else "of"
        lines = [f"{self.file}: {self.kept:,} {of} {counted(self.samples, 'sample')}, {counted(self.turns, 'turn')} ({found})"]
        if self.note:
            lines.append(self.note)
        if self.left_out:
            shown = ", ".join(map(on_one_line, self.left_out[:3])) + ", ..." * (len(self.left_out) > 3)
            lines.append(f"{counted(len(self.left_out), 'other file')} in it left out: {shown}")
        if self.unread:
            lines.append(_unread_line(self.unread))
        if self.split:
            lines.append(f"{counted(self.split, 'sample')} longer than --model_max_length, split between rounds")
        if any(self.lost.values()):
            lines.append("parts of split samples dropped: " + listed(self.lost))
        if self.tokens is None:
            lines.append(
                "tokenised when they are needed: how many tokens they have, which are cut off, and which thoughts the template "
                "leaves out, is not known"
            )
        else:
            lines.append(f"{counted(self.tokens, 'token')}, {self.trained_tokens:,} of them trained on")
        if self.bad:
            lines += [f"{counted(self.bad, 'bad sample')} skipped, such as", *(f"  {each}" for each in self.first_bad)]
        if self.dropped:
            lines.append("samples dropped: " + listed(self.dropped))
        if self.cut_samples:
            what = counted(self.cut_samples, "row" if self.split else "sample")
            lines.append(
                f"{what} longer than --model_max_length, the longest {self.longest:,} tokens: "
                f"{counted(self.cut_tokens or 0, 'token')} cut off, {self.cut_trained_tokens:,} of them answers"
            )
        if any(self.dropped_turns.values()):
            turns = {reason: self.dropped_turns.get(reason, 0) for reason in (LEADING, UNANSWERED)}
            lines.append("turns dropped: " + listed(turns))
        if self.dropped_thoughts:
            lines.append(
                f"the template leaves out the thoughts of {counted(self.dropped_thoughts, 'answer')}, of {self.thoughts:,} "
                "that have some"
            )
        if self.empty_answers:
            lines.append(f"{counted(self.empty_answers, 'empty answer')}, not trained on")
        return lines

    @property
    def untrained_share(self) -> float:
        """The share of the usable samples that were dropped, since nothing in them is trained on: 0 to 1."""
        usable = self.samples - self.bad
        return sum(self.dropped.values()) / usable if usable else 0.0


def total(parts: Iterable[DataReport]) -> DataReport:
    """One report of a source that was read in parts, at least one."""
    return functools.reduce(_sum, parts)


def _sum(one: DataReport, other: DataReport) -> DataReport:
    ends = {"shortest": min, "longest": max}
    counts = {each.name: _added(getattr(one, each.name), getattr(other, each.name)) for each in fields(DataReport)
              if type(getattr(one, each.name)) is int or type(getattr(other, each.name)) is int}  # fmt: skip
    lengths = {name: [getattr(each, name) for each in (one, other) if getattr(each, name) is not None] for name in ends}
    return replace(
        one,
        **counts
        | {name: end(lengths[name], default=None) for name, end in ends.items()}
        | {
            "has_trained": one.has_trained or other.has_trained,
            "layouts": tuple(sorted({*one.layouts, *other.layouts})),
            "first_bad": (*one.first_bad, *other.first_bad)[:MOST_SHOWN],
            **{name: dict(Counter(getattr(one, name)) + Counter(getattr(other, name))) for name in _COUNTED},
        },
    )


def _unread_line(unread: Mapping[str, int]) -> str:
    """Worked example: {"id": 3, "note": 1} → "keys that are not read: id (3 samples), note (1 sample)"."""
    shown = [
        f"{on_one_line(key)} ({counted(count, 'sample')})" for key, count in sorted(unread.items(), key=lambda item: -item[1])
    ]
    return "keys that are not read: " + ", ".join(shown[:MOST_KEYS_SHOWN]) + ", ..." * (len(shown) > MOST_KEYS_SHOWN)


def _added(one: Any, other: Any) -> int:
    return (one or 0) + (other or 0)


def counted(number: int, what: str) -> str:
    """Worked example: 1, "sample" → "1 sample"; 1200, "sample" → "1,200 samples"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)
