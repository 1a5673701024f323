"""Parse `--simulate_fault`: faults that a run has on purpose, so that a cluster's set-up can be tried before a long run.

kill:rank=1,step=5; slow:rank=0,step=8,seconds=30
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zero_sft.errors import ArgumentError
from zero_sft.printable import with_count

KINDS = {
    "kill": "be killed with SIGKILL",
    "hang": "hang",
    "nan": "have a loss that is not a number",
    "oom": "run out of device memory",
    "slow": "be slow from then on",
    "disk_full": "find a full disk when checkpoints are written, from then on",
    "preempt": "get SIGTERM",
}
"""The faults, by name, and the effect of each on its rank."""

_KEYS = ("rank", "step", "start", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of one rank, at the beginning of a step.

    Attributes:
        start: the start of the run in which it happens: 1 is the first, 2 the first restart; 0: in each.
        seconds: by which a slow rank is delayed, in this step and all later ones.
    """

    kind: str
    rank: int
    step: int
    start: int = 1
    seconds: int = 10

    def __str__(self) -> str:
        return f"at step {self.step} rank {self.rank} will {KINDS[self.kind]}"


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults of `kind:rank=R,step=S`; several are separated by semicolons.

    Raises:
        ArgumentError: another form, an unknown fault, or no step.
    """
    return tuple(_parse(part.strip()) for part in text.split(";"))


def require_ranks(faults: Sequence[Fault], world_size: int) -> None:
    """Raise ArgumentError if a fault is of a rank that this run does not have: it would try nothing."""
    for fault in faults:
        if fault.rank >= world_size:
            raise ArgumentError(
                f"--simulate_fault names rank {fault.rank}, and this run has {with_count(world_size, 'rank')}, from 0 on.",
                code="arguments.bad_fault",
            )


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    is_usable = kind in KINDS and len(values) == len(pairs) and {"rank", "step"} <= values.keys() <= set(_KEYS)
    if not is_usable or not all(value.isdecimal() and len(value) < 10 for value in values.values()):
        raise ArgumentError(
            f"--simulate_fault {text!s:.80}: expected kind:rank=R,step=S with one of {', '.join(KINDS)}, and if wanted start=N "
            "(of the run; 1 is the first) and seconds=N (slow), all whole numbers. Several are separated by semicolons.",
            code="arguments.bad_fault",
        )
    fault = Fault(kind=kind, **{name: int(value) for name, value in values.items()})
    if fault.step < 1:
        raise ArgumentError("--simulate_fault: steps are counted from 1", code="arguments.bad_fault")
    return fault
