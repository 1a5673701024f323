"""What a load did: an honest account, per rank and for the slowest, in numbers that can be checked."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class LoadReport:
    """The account of one load on one rank; the lists are the same on every rank.

    `mismatched` holds `(name, expected shape, got shape)`; `doubled` are stored names that several files have, of which the
    last file's was taken, as in `from_pretrained`. `dequantised` tensors were multiplied by their scales while they were read;
    `untraced` ones, with the bytes that a node held for each, were computed from whole stored tensors. `bytes_read` counts
    checkpoint data of this rank, of which `bytes_mapped` were taken in place from the page cache; `bytes_communicated` what it
    sent to others, in bytes. `seconds` is this rank's wall time, `slowest_seconds` the slowest rank's; `stages` splits
    `seconds` by stage. `operations` are the conversions by which tensors were made of others, as in the merging of experts.
    `verified` is the number of tensors read back and found equal, if asked for. `peak_host_bytes` and `peak_device_bytes` are
    what this rank held at most over what it had at the start; `ranks` has the numbers of every rank, in order.
    """

    loader: str
    model: str
    parameters: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    dequantised: list[str] = field(default_factory=list)
    untraced: list[tuple[str, int]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    dtype: str = ""
    verified: int | None = None
    requests: int = 0
    bytes_read: int = 0
    bytes_mapped: int = 0
    bytes_communicated: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    world_size: int = 1
    stages: dict[str, float] = field(default_factory=dict)
    ranks: list[dict[str, float]] = field(default_factory=list)

    def numbers(self) -> dict[str, float]:
        """This rank's own numbers, for the others."""
        return {name: getattr(self, name) for name, _, _, _ in _ROWS} | {f"stage {k}": v for k, v in self.stages.items()}

    def gather(self, everyone: list[dict[str, float]]) -> None:
        """Take in the numbers of all ranks."""
        self.ranks = everyone
        self.slowest_seconds = max(each["seconds"] for each in everyone)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """The report for a person, a few lines."""
        lines = [
            f"loaded {self.model}: {self.parameters / 1e6:,.1f} M parameters in {self.dtype} by the {self.loader} loader on "
            f"{self.world_size} rank{'s' * (self.world_size > 1)} in {self.slowest_seconds:.2f} s (slowest rank)",
        ]
        lines += self._table()
        if self.verified is not None:
            lines.append(f"  read back: {self.verified} of the model's tensors are what the files give, on every rank")
        for title, names in self._notable():
            lines.append(f"  {title}: {len(names)} ({_shown(names)})")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """The numbers of this rank, of the slowest, and of all together, a row each."""
        everyone = self.ranks or [self.numbers()]
        slowest = max(range(len(everyone)), key=lambda rank: everyone[rank]["seconds"])
        columns = {"rank 0": everyone[0], f"slowest, rank {slowest}": everyone[slowest]}
        rows = [(name, title, unit, combine) for name, title, unit, combine in _ROWS if any(each[name] for each in everyone)]
        rows[1:1] = [(f"stage {stage}", f"  {stage}", 1.0, max) for stage in self.stages]
        lines = [f"  {'':24}" + "".join(f"{title:>20}" for title in (*columns, "all together"))]
        for name, title, unit, combine in rows:
            values = [each.get(name, 0) for each in columns.values()] + [combine(each.get(name, 0) for each in everyone)]
            digits = 2 if unit == 1.0 else 1 if unit > 1 else 0
            lines.append(f"  {title:24}" + "".join(f"{value / (unit or 1):>20,.{digits}f}" for value in values))
        return lines

    def _notable(self) -> list[tuple[str, Sequence[str]]]:
        rows = [
            ("missing, initialised as the model defines", self.missing),
            ("unexpected, left unread", self.unexpected),
            ("of another shape", [name for name, _, _ in self.mismatched]),
            ("in several files, the last one's taken", self.doubled),
            ("tied", self.tied),
            ("stored in another dtype, cast while reading", self.cast),
            ("dequantised while reading", self.dequantised),
            ("computed from whole tensors, once a node", [name for name, _ in self.untraced]),
            ("conversions", self.operations),
        ]
        return [(title, names) for title, names in rows if names]


_ROWS: tuple[tuple[str, str, float, Callable[[Iterable[float]], float]], ...] = (
    ("seconds", "seconds (longest)", 1.0, max),
    ("bytes_read", "MiB read (sum)", 2**20, sum),
    ("bytes_mapped", "MiB of it mapped (sum)", 2**20, sum),
    ("requests", "read requests (sum)", 0, sum),
    ("bytes_communicated", "KiB of exchanges (sum)", 2**10, sum),
    ("peak_host_bytes", "MiB grown, host (most)", 2**20, max),
    ("peak_device_bytes", "MiB grown, device (most)", 2**20, max),
)
"""Name, title, unit (0: a count), and how the ranks' numbers are put together."""


def _shown(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
