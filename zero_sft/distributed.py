"""Small exchanges on the CPU, and failures that every rank raises together.

The exchanges themselves are in `cluster/control_group.py`, and are named here too.

A stage that can fail ends in `agreed`: either every rank passes, or every rank raises the same error. Left out: anything
that moves weights; no weight crosses the network during a load.
"""

import contextlib
import datetime
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist

from zero_sft import errors
from zero_sft.cluster import failure as failures
from zero_sft.cluster.control_group import (
    DOWNLOAD_TIMEOUT,
    broadcast_bytes,
    bytes_communicated,
    connect,
    control_group,
    disconnect,
    exchange,
    exchange_bytes,
)
from zero_sft.world import World

__all__ = [
    "DOWNLOAD_TIMEOUT",
    "STAGE_TIMEOUT",
    "Told",
    "agree_on",
    "agreed",
    "broadcast_bytes",
    "by_turns",
    "bytes_communicated",
    "connect",
    "disconnect",
    "exchange",
    "exchange_bytes",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

STAGE_TIMEOUT = datetime.timedelta(minutes=30)
"""How long ranks wait at the end of a stage for the slowest one before the error names it."""


@dataclass(slots=True)
class Told:
    """What ranks tell each other at the end of an `agreed` stage: `mine`, a JSON value; then `everyone`'s, in rank order.

    `same`, a name and JSON-able values, is what all ranks must hold alike, as in `agree_on`.
    """

    mine: Any = None
    everyone: list[Any] = field(default_factory=list)
    same: tuple[str, Mapping[str, Any]] | None = None


@contextlib.contextmanager
def agreed(world: World, stage: str, timeout: datetime.timedelta = STAGE_TIMEOUT) -> Iterator[Told]:
    """Run a stage that can fail on any rank, and let all ranks pass or raise together. Every rank; communicates at the end.

    Nothing inside may communicate: a rank that fails leaves early. The error raised is the one of the lowest failing rank,
    in its own class if it is one of `zero_sft.errors`, else as a `DistributedError` that names its type. What the stage
    writes to the value of this context travels along; all ranks set its `same`, or none.

    Raises:
        ZeroSftError: on every rank, if any rank failed, or did not get here within `timeout`.
    """
    with failures.stage(stage):
        yield from _agreed(world, stage, timeout)


def _agreed(world: World, stage: str, timeout: datetime.timedelta) -> Iterator[Told]:
    failure: Exception | None = None
    told = Told()
    try:
        yield told
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not be left waiting
        failure = error
    if world.world_size == 1:
        if failure is not None:
            raise failure
        told.everyone = [told.mine]
        return
    _await_all(stage, timeout)
    report = None if failure is None else [type(failure).__name__, str(failure), *getattr(failure, "codes", ())]
    digest = told.same and _digest(told.same[1])
    everyone = exchange(world, [report, told.mine, digest])
    reports, told.everyone, digests = (list(each) for each in zip(*everyone, strict=True))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        if told.same:
            _require_same(world, *told.same, digests)
        return
    kind, message, *codes = reports[failed[0]]
    if len({tuple(reports[rank]) for rank in failed}) > 1 or len(failed) < world.world_size:
        ranks = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        message += f"\n(rank {failed[0]} of {world.world_size} while {stage}; failed: rank {ranks})"
    says_no_more = isinstance(failure, errors.ZeroSftError)
    raise _rebuilt(kind, message, codes) from None if says_no_more else failure


def _await_all(stage: str, timeout: datetime.timedelta) -> None:
    start = time.monotonic()
    try:
        dist.monitored_barrier(group=control_group(), timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        seconds = time.monotonic() - start
        named = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
        ranks = f"rank {named[1].strip()}" if named else "a rank"
        if seconds < 0.9 * timeout.total_seconds():
            raise errors.RankLostError(
                f"{ranks} ended while the others were at '{stage}'. Its own output says why; without one, it was killed.",
                code="cluster.rank_lost",
            ) from error
        raise errors.RankLostError(
            f"{ranks} did not come to the end of '{stage}' within {timeout}. Its storage or its network hangs; look at its "
            "host.",
            code="cluster.rank_late",
        ) from error


def _rebuilt(kind: str, message: str, codes: Sequence[str]) -> errors.ZeroSftError:
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.ZeroSftError):
        error = cls(message, code=codes[0], listed=codes[1:])
    else:
        error = errors.DistributedError(f"{kind}: {message}", code="cluster.rank_failed")
    error.agreed = True
    return error


def by_turns(
    world: World, stage: str, act: Callable[[], T], *, one_by_one: bool, timeout: datetime.timedelta = STAGE_TIMEOUT
) -> T:
    """`act` on every rank, `agreed`; `one_by_one`: on rank 0 first, then on a rank of each node, then on the others.

    That is for what one rank leaves in a folder that others may share: transformers copies custom code to one, data is
    prepared into one. Each turn may take `timeout`. Every rank; communicates.
    """
    turns = 3 if one_by_one else 1
    mine = min(turns - 1, 0 if world.is_main else 1 if world.leads_node else 2)
    results: list[T] = []
    for turn in range(turns):
        with agreed(world, stage, timeout):
            if turn == mine:
                results.append(act())
    return results[0]


def agree_on(world: World, what: str, values: Mapping[str, Any]) -> None:
    """Raise one error on every rank unless all ranks hold the same JSON-able `values`. Every rank; communicates.

    A digest is compared first; the values themselves travel only when it differs.

    Raises:
        DistributedError: naming the keys that differ, with each variant and the ranks that hold it.
    """
    _require_same(world, what, values, exchange(world, _digest(values)))


def _canonical(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}


def _digest(values: Mapping[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()


def _require_same(world: World, what: str, values: Mapping[str, Any], digests: Sequence[str]) -> None:
    """`agree_on`, where every rank's `_digest` is known."""
    if len(set(digests)) == 1:
        return
    everyone = exchange(world, _canonical(values))
    lines = []
    for key in sorted({key for each in everyone for key in each}):
        variants: dict[str, list[int]] = {}
        for rank, each in enumerate(everyone):
            variants.setdefault(each.get(key, "(absent)"), []).append(rank)
        if len(variants) > 1:
            shown = "; ".join(f"{text[:200]} on rank {', '.join(map(str, ranks))}" for text, ranks in variants.items())
            lines.append(f"  {key}: {shown}")
    error = errors.DistributedError(
        f"the ranks disagree about the {what}:\n" + "\n".join(lines) + "\nGive every rank the same files and arguments.",
        code="cluster.ranks_disagree",
    )
    error.agreed = True
    raise error
