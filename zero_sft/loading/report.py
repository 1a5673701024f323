"""Report of a load: names of keys, numbers of every rank, and a summary to print."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zero_sft.console.progress import format_bytes
from zero_sft.printable import first_of, with_count

Numbers = Mapping[str, float]
"""The numbers of one rank, as `LoadStats.numbers` returns them."""


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """Names and counts that are the same on every rank.

    Attributes:
        parameters: number of elements of the model's parameters; tied parameters count once.
        missing_keys: names that the checkpoint lacks; the model initialised them.
        unexpected_keys: stored tensors that the model does not have, by the names to which transformers' rules rename them.
        mismatched_keys: `(name, expected shape, stored shape)`.
        duplicate_keys: names that several files store; the last file's tensor was loaded, as in `from_pretrained`.
        tied_keys: names that share the tensor of another name, stored or not.
        cast_keys: names that are stored in another dtype.
        dequantized_keys: names that were multiplied by their scales while they were read.
        quantized_keys: names that were quantised to 4 bits while they were read.
        untraceable_keys: names that were computed from whole stored tensors, with the bytes that a node held for each.
        operations: conversions that were applied, such as merging experts.
        verified: number of tensors that were read back and found equal; None without `verify`.
    """

    parameters: int = 0
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    duplicate_keys: list[str] = field(default_factory=list)
    tied_keys: list[str] = field(default_factory=list)
    cast_keys: list[str] = field(default_factory=list)
    dequantized_keys: list[str] = field(default_factory=list)
    quantized_keys: list[str] = field(default_factory=list)
    untraceable_keys: list[tuple[str, int]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    verified: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadStats:
    """Numbers of one rank.

    Attributes:
        requests: number of read requests, in all phases except `headers` and `verify`.
        bytes_read: bytes of the checkpoint that these requests read.
        bytes_communicated: bytes that the rank sent to other ranks.
        seconds: wall time of the rank.
        stages: the seconds of each phase of the load. A phase may hold several collective stages, or none.
        peak_host_bytes, peak_device_bytes: peak memory of the rank above its memory at the start.
    """

    requests: int = 0
    bytes_read: int = 0
    bytes_communicated: int = 0
    seconds: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return the numbers as one flat dictionary, to send to the other ranks."""
        names = [field.name for field in dataclasses.fields(LoadStats) if field.name != "stages"]
        phases = {f"stage {phase}": seconds for phase, seconds in self.stages.items()}
        return {name: getattr(self, name) for name in names} | phases


FORMER_FIELDS = {
    "missing": "missing_keys",
    "unexpected": "unexpected_keys",
    "mismatched": "mismatched_keys",
    "doubled": "duplicate_keys",
    "tied": "tied_keys",
    "cast": "cast_keys",
    "dequantised": "dequantized_keys",
    "untraced": "untraceable_keys",
}
"""Names that fields of `LoadReport` had before the first release. They work for one release, with a warning."""


@dataclass(frozen=True, kw_only=True)
class LoadReport(LoadStats, KeyReport):
    """Report of one load on one rank: names of keys, this rank's numbers, and in `ranks` every rank's numbers in order.

    `slowest_seconds` is the wall time of the slowest rank.
    """

    loader: str
    model: str
    dtype: str = ""
    rank: int = 0
    world_size: int = 1
    ranks: list[dict[str, float]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name in FORMER_FIELDS:
            warnings.warn(f"LoadReport.{name} is now LoadReport.{FORMER_FIELDS[name]}", FutureWarning, stacklevel=2)
            return getattr(self, FORMER_FIELDS[name])
        raise AttributeError(name)

    @property
    def slowest_seconds(self) -> float:
        """Wall time of the slowest rank, in seconds."""
        return max(rank["seconds"] for rank in self.ranks) if self.ranks else self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return dataclasses.asdict(self) | {"slowest_seconds": self.slowest_seconds}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """Return the report as a few readable lines, the same on every rank. `print_summary` prints them once."""
        ranks = with_count(self.world_size, "rank")
        lines = [
            f"loaded {self.model} in {self.slowest_seconds:.2f} s: {self.parameters / 1e6:,.1f} M parameters in {self.dtype}, "
            f"sharded over {ranks} ({self.loader} loader)"
        ]
        lines += self._table()
        if self.verified is not None:
            lines.append(f"  read back: {self.verified} tensors of the model equal the files, on every rank")
        for title, names in self._notable():
            lines.append(f"  {title}: {len(names)} ({first_of(names)})")
        return "\n".join(lines)

    def print_summary(self) -> None:
        """Print the summary to stdout on rank 0, and nothing on other ranks. Any rank; does not communicate."""
        if self.rank == 0:
            sys.stdout.write(self.summary() + "\n")
            sys.stdout.flush()

    def _table(self) -> list[str]:
        """Format a row for each number: minimum and maximum over the ranks, and the total where it is meaningful."""
        ranks = self.ranks or [self.numbers()]
        columns = ["one rank: least", "most", "all ranks"] if len(ranks) > 1 else ["this rank"]
        lines = [f"  {'':{_TITLE_WIDTH}}" + "".join(f"{title:>{_WIDTH}}" for title in columns)]
        for row in [*_ROWS[:1], *(_phase_row(phase) for phase in self.stages), *_ROWS[1:]]:
            values = [row.value(numbers) for numbers in ranks]
            if not any(values):
                continue
            cells = [row.form(min(values)), row.form(max(values)), "" if row.total is None else row.form(row.total(ranks))]
            cells = cells if len(ranks) > 1 else cells[:1]
            lines.append((f"  {row.title:{_TITLE_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)).rstrip())
        return lines

    def _notable(self) -> list[tuple[str, Sequence[str]]]:
        rows = [
            ("missing, initialised as the model defines", self.missing_keys),
            ("unexpected, left unread", self.unexpected_keys),
            ("of another shape", [name for name, _, _ in self.mismatched_keys]),
            ("in several files, loaded from the last one", self.duplicate_keys),
            ("tied", self.tied_keys),
            ("stored in another dtype, cast while reading", self.cast_keys),
            ("dequantised while reading", self.dequantized_keys),
            ("quantised to 4 bits while reading", self.quantized_keys),
            ("computed from whole tensors, once per node", [name for name, _ in self.untraceable_keys]),
            ("conversions", self.operations),
        ]
        return [(title, names) for title, names in rows if names]


def _speed(value: float) -> str:
    return f"{format_bytes(value)}/s"


def _read_speed(ranks: Sequence[Numbers]) -> float:
    """Return the bytes per second of the phases that read weights, on all these ranks together."""
    slowest = max(rank.get("stage read", 0.0) + rank.get("stage quantise", 0.0) for rank in ranks)
    return sum(rank["bytes_read"] for rank in ranks) / slowest if slowest else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of the summary.

    Attributes:
        value: takes the row's number from the numbers of one rank.
        form: formats a number.
        total: computes the number of all ranks, if there is one.
    """

    title: str
    value: Callable[[Numbers], float]
    form: Callable[[float], str]
    total: Callable[[Sequence[Numbers]], float] | None = None


def _summed(title: str, name: str, form: Callable[[float], str]) -> _Row:
    return _Row(title=title, value=lambda rank: rank[name], form=form, total=lambda ranks: sum(rank[name] for rank in ranks))


def _phase_row(phase: str) -> _Row:
    title = f"  {_PHASE_TITLES.get(phase, phase)}"
    return _Row(title=title, value=lambda rank: rank.get(f"stage {phase}", 0.0), form=_SECONDS)


_TITLE_WIDTH, _WIDTH = 44, 17
_SECONDS = "{:,.2f} s".format

_PHASE_TITLES = {
    "skeleton": "build the model without weights",
    "headers": "read the files' headers",
    "match": "match the checkpoint to the model",
    "initialise": "initialise what the checkpoint lacks",
    "plan": "plan the reads",
    "read": "read the weights",
    "quantise": "read and quantise to 4 bits",
    "compute": "compute what can't be read in place",
    "finish": "tie weights, finish the model",
    "verify": "verify the shards against the files",
}
"""Titles of the phases in `LoadReport.stages`."""

_ROWS = (
    _Row(title="time", value=lambda rank: rank["seconds"], form=_SECONDS),
    _summed("read from the checkpoint", "bytes_read", format_bytes),
    _summed("  in how many reads", "requests", "{:,.0f}".format),
    _Row(title="  speed", value=lambda rank: _read_speed([rank]), form=_speed, total=_read_speed),
    _summed("messages between ranks, none with weights", "bytes_communicated", format_bytes),
    _Row(title="host memory, highest above the start", value=lambda rank: rank["peak_host_bytes"], form=format_bytes),
    _Row(title="device memory, highest above the start", value=lambda rank: rank["peak_device_bytes"], form=format_bytes),
)
