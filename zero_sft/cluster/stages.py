"""Stages that either succeed on every rank or raise the same error on every rank.

`collective_stage` runs code that may fail on any rank and ends with a small all-gather. `require_identical` checks that all
ranks hold the same values. Both use the control group (`control_group.py`), which never carries weights.
"""

import contextlib
import datetime
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist

from zero_sft import errors
from zero_sft.cluster import failure_report, stage_watch
from zero_sft.cluster.control_group import all_gather_json, control_group
from zero_sft.cluster.world import World
from zero_sft.errors import Scope
from zero_sft.printable import first_of

T = TypeVar("T")

STAGE_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest time that ranks wait for the slowest rank at the end of a stage."""

_SLOWEST_BYTES_PER_SECOND = 20e6
"""The bandwidth of the slowest storage that ranks share: those that have their part wait for the others."""


def timeout_for_bytes(nbytes: int) -> datetime.timedelta:
    """Return the longest time that ranks wait while the others read or write.

    Args:
        nbytes: the bytes of all ranks together.
    """
    return STAGE_TIMEOUT + datetime.timedelta(seconds=nbytes / _SLOWEST_BYTES_PER_SECOND)


@dataclass(slots=True)
class StageExchange:
    """Values that ranks exchange at the end of a `collective_stage`.

    Attributes:
        local: the JSON value of this rank; set it inside the stage.
        gathered: the values of all ranks, in rank order; available after the stage.
        must_match: a name and JSON-able values that must be equal on all ranks, as in `require_identical`. Either all ranks
            set it or none does.
    """

    local: Any = None
    gathered: list[Any] = field(default_factory=list)
    must_match: tuple[str, Mapping[str, Any]] | None = None


@contextlib.contextmanager
def collective_stage(world: World, name: str, timeout: datetime.timedelta = STAGE_TIMEOUT) -> Iterator[StageExchange]:
    """Run a stage that may fail on any rank; all ranks pass or raise together. Every rank; communicates at the end.

    Code inside must not communicate, because a failing rank leaves the stage early. All ranks raise the error of the lowest
    failing rank. It keeps its class if that is one of `zero_sft.errors`; otherwise it becomes a `DistributedError` that names
    its type.

    Raises:
        ZeroSftError: on every rank, if a rank failed or did not finish the stage within `timeout`.
    """
    exchange = StageExchange()
    failure: BaseException | None = None
    with failure_report.activity(name):
        try:
            with stage_watch.during(name):
                yield exchange
        except BaseException as error:
            if not errors.is_failure(error):
                raise
            failure = error
        if world.world_size > 1:
            _end_together(world, name, timeout, exchange, failure)
        elif failure is not None:
            raise failure
        else:
            exchange.gathered = [exchange.local]


def _end_together(
    world: World, name: str, timeout: datetime.timedelta, exchange: StageExchange, failure: BaseException | None
) -> None:
    _await_all(name, timeout)
    report = None if failure is None else [type(failure).__name__, str(failure), *getattr(failure, "codes", ())]
    digest = exchange.must_match and _digest(exchange.must_match[1])
    gathered = all_gather_json(world, [report, exchange.local, digest])
    reports, exchange.gathered, digests = (list(column) for column in zip(*gathered, strict=True))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        if exchange.must_match:
            _require_identical(world, *exchange.must_match, digests)
        return
    kind, message, *codes = reports[failed[0]]
    # Ranks that all fail alike have an error of the input; otherwise the message says which ranks failed.
    if len({tuple(reports[rank]) for rank in failed}) > 1 or len(failed) < world.world_size:
        message += f"\n(rank {failed[0]} of {world.world_size} while {name}; failed: rank {first_of(failed, 8)})"
    # A ZeroSftError says all in its message; the traceback of any other error of this rank is kept as the cause.
    raise _recreate(kind, message, codes) from None if isinstance(failure, errors.ZeroSftError) else failure


def _await_all(stage: str, timeout: datetime.timedelta) -> None:
    start = time.monotonic()
    try:
        dist.monitored_barrier(group=control_group(), timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        seconds = time.monotonic() - start
        match = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
        ranks = f"rank {match[1].strip()}" if match else "a rank"
        if seconds < 0.9 * timeout.total_seconds():
            raise errors.RankLostError(
                f"{ranks} ended while the others were at '{stage}'. Its output shows why; without output, it was killed.",
                code="cluster.rank_lost",
            ) from error
        raise errors.RankLostError(
            f"{ranks} did not reach the end of '{stage}' within {timeout}; check its host, whose storage or network may hang.",
            code="cluster.rank_late",
        ) from error


def _recreate(kind: str, message: str, codes: Sequence[str]) -> errors.ZeroSftError:
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.ZeroSftError):
        return cls(message, code=codes[0], listed=codes[1:], scope=Scope.ALL_RANKS)
    return errors.DistributedError(f"{kind}: {message}", code="cluster.rank_failed", scope=Scope.ALL_RANKS)


def run_stage(
    world: World, name: str, action: Callable[[], T], *, main_first: bool, timeout: datetime.timedelta = STAGE_TIMEOUT
) -> T:
    """Run `action` on every rank in a `collective_stage` and return its result. Every rank; communicates.

    With `main_first`, it runs on rank 0 first, then on one rank of each other node, then on the remaining ranks. Use it for
    files that one rank writes to a folder that others may share, such as transformers' custom code or prepared data. `timeout`
    applies to each turn.
    """
    turns = 3 if main_first else 1
    local_turn = min(turns - 1, 0 if world.is_main else 1 if world.leads_node else 2)
    results: list[T] = []
    for turn in range(turns):
        with collective_stage(world, name, timeout):
            if turn == local_turn:
                results.append(action())
    return results[0]


def require_identical(world: World, what: str, values: Mapping[str, Any]) -> None:
    """Raise the same error on every rank unless all ranks hold equal JSON-able `values`. Every rank; communicates.

    Ranks compare a digest first and exchange the values only if it differs.

    Raises:
        DistributedError: with the keys that differ, each variant, and the ranks that hold it.
    """
    _require_identical(world, what, values, all_gather_json(world, _digest(values)))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, so that a message names the setting that differs: {"a": {"b": 1}} → {"a.b": 1}. Pure."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()


def _require_identical(world: World, what: str, values: Mapping[str, Any], digests: Sequence[str]) -> None:
    """Do the same as `require_identical`, with the `_digest` of every rank."""
    if len(set(digests)) == 1:
        return
    gathered = all_gather_json(world, _canonical(values))
    lines = []
    for key in sorted({key for rank_values in gathered for key in rank_values}):
        variants: dict[str, list[int]] = {}
        for rank, rank_values in enumerate(gathered):
            variants.setdefault(rank_values.get(key, "(absent)"), []).append(rank)
        if len(variants) > 1:
            shown = "; ".join(f"{text[:200]} on rank {', '.join(map(str, ranks))}" for text, ranks in variants.items())
            lines.append(f"  {key}: {shown}")
    raise errors.DistributedError(
        f"the ranks disagree about the {what}:\n" + "\n".join(lines) + "\nGive every rank the same files and arguments.",
        code="cluster.ranks_disagree",
        scope=Scope.ALL_RANKS,
    )
