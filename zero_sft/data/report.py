"""What became of the data: an account for the log."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file or folder. What only tokenising shows is None where samples are tokenised lazily.

    `bad` are the errors of the samples that were skipped; they count among `samples`, as does a sample that was `split`.
    """

    file: str
    layouts: tuple[str, ...]
    template: str
    samples: int
    kept: int
    turns: int = 0
    split: int = 0
    bad: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    leading_turns: int = 0
    unanswered_turns: int = 0
    empty_answers: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None
    cut_samples: int | None = None
    cut_tokens: int | None = None
    cut_trained_tokens: int | None = None

    def lines(self) -> list[str]:
        """The report for the log: what there is, then only what was left out."""
        found = f"format {' and '.join(self.layouts)}, template {self.template}"
        lines = [f"{self.file}: {self.kept:,} of {self.samples:,} samples, {self.turns:,} turns ({found})"]
        if self.split:
            lines.append(f"{self.split:,} samples longer than --model_max_length, split between rounds")
        if self.tokens is not None:
            lines.append(f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained on")
        if self.bad:
            lines.append(f"{len(self.bad):,} bad samples skipped, the first: {self.bad[0]}")
        if self.dropped:
            lines.append("samples dropped: " + listed(self.dropped))
        if self.cut_samples:
            lines.append(
                f"{self.cut_samples:,} samples longer than --model_max_length: {self.cut_tokens:,} tokens cut off, "
                f"{self.cut_trained_tokens:,} of them answers"
            )
        turns = {"leading, not the user's": self.leading_turns, "last, unanswered": self.unanswered_turns}
        if any(turns.values()):
            lines.append("turns dropped: " + listed(turns))
        if self.empty_answers:
            lines.append(f"{self.empty_answers:,} empty answers, not trained on")
        return lines


def listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)
