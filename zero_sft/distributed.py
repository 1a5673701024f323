"""Small exchanges on the CPU, and failures that every rank raises together.

All traffic of this package goes through one gloo group of its own
(`connect`), never through NCCL: it works before a GPU is touched, its waiting does not run on the training group's clock,
and a dead peer is noticed by its closed socket. Payloads are bytes or JSON, never pickles.

A stage that can fail ends in `agreed`: either every rank passes, or every rank raises the same error. Left out: anything
that moves weights; no weight crosses the network during a load.
"""

import atexit
import contextlib
import datetime
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from zero_sft import errors
from zero_sft.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")

STAGE_TIMEOUT = datetime.timedelta(minutes=30)
"""How long ranks wait at the end of a stage for the slowest one before the error names it."""

_SHORT_BYTES = 256
"""What the first round of an exchange carries of each rank: 8 bytes of length, and the payload where it fits."""

DOWNLOAD_TIMEOUT = datetime.timedelta(hours=24)
"""How long ranks wait for a download by another rank."""


class _Control:
    """The gloo group of this package and what has gone through it; made anew when the default group changes."""

    group: Any = None
    parent: Any = None
    bytes_sent: int = 0
    owns_default_group: bool = False


def connect(world: World) -> None:
    """Join the default process group (made by DeepSpeed if nobody has) and make the control group. Every rank.

    Raises:
        DistributedError: a process group exists already whose size or rank is not this world's.
    """
    if not dist.is_initialized():
        _start_default_group(world)
        _Control.owns_default_group = True
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.world_size):
        raise errors.DistributedError(
            f"torch.distributed says rank {dist.get_rank()} of {dist.get_world_size()}, the launcher's variables say rank "
            f"{world.rank} of {world.world_size}. Don't make a process group of another size before the load: ZeRO-3 would "
            "silently keep the model whole."
        )
    default = dist.group.WORLD
    if _Control.group is None or _Control.parent is not default:
        if _Control.group is None:
            atexit.register(disconnect)
        _Control.group = dist.new_group(backend="gloo", timeout=DOWNLOAD_TIMEOUT)
        _Control.parent = default


def disconnect() -> None:
    """Leave the gloo groups that `connect` made, at the program's end. Does not wait for other ranks.

    Threads of theirs that live on into the interpreter's exit may end it with "terminate called".
    """
    if dist.is_initialized() and _Control.parent is dist.group.WORLD and _Control.group is not None:
        is_gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group(None if _Control.owns_default_group and is_gloo else _Control.group)
    _Control.group, _Control.parent, _Control.owns_default_group = None, None, False


def _start_default_group(world: World) -> None:
    """DeepSpeed reads the rank from the environment alone, so what SLURM or a lone process lacks is written there."""
    import deepspeed

    from zero_sft.zero.devices import require_own_device
    from zero_sft.zero.operators import prefer_own_ninja, require_no_stale_lock
    from zero_sft.zero.shared_memory import unlink_own

    require_own_device(world)
    require_no_stale_lock()
    prefer_own_ninja()
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world.local_world_size))
    if world.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if "MASTER_ADDR" not in os.environ:
        raise errors.ConfigError(
            "MASTER_ADDR is not set, so the ranks can't find each other. Start the job with ./launch.sh, which derives it, "
            "or export MASTER_ADDR and MASTER_PORT."
        )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    dist.barrier()
    unlink_own(world.rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bytes_communicated() -> int:
    """Bytes that this rank has put into exchanges of this package since the process began."""
    return _Control.bytes_sent


def exchange_bytes(world: World, payload: bytes) -> list[bytes]:
    """Give every rank every rank's `payload`, in rank order. Every rank; communicates."""
    if world.world_size == 1:
        return [payload]
    # A short payload travels with its length: one round of messages instead of two.
    first = torch.zeros(_SHORT_BYTES, dtype=torch.uint8)
    first[:8] = torch.frombuffer(bytearray(len(payload).to_bytes(8, "little")), dtype=torch.uint8)
    if 0 < len(payload) <= _SHORT_BYTES - 8:
        first[8 : 8 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    heads = _gathered(first, world)
    sizes = [int.from_bytes(head[:8].numpy().tobytes(), "little") for head in heads]
    longest = max(sizes)
    if longest <= _SHORT_BYTES - 8:
        return [head[8 : 8 + size].numpy().tobytes() for head, size in zip(heads, sizes, strict=True)]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else padded[:0]
    return [each[:size].numpy().tobytes() for each, size in zip(_gathered(padded, world), sizes, strict=True)]


def _gathered(mine: torch.Tensor, world: World) -> list[torch.Tensor]:
    """Every rank's tensor of the same size, in rank order. Every rank; communicates."""
    received = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(received, mine, group=_Control.group)
    _Control.bytes_sent += mine.numel() * (world.world_size - 1)
    return received


def broadcast_bytes(world: World, payload: bytes | None) -> bytes:
    """Give every rank what rank 0 passes (the others pass None). Every rank; communicates."""
    if world.world_size == 1:
        return payload or b""
    size = torch.tensor([len(payload or b"")], dtype=torch.int64)
    dist.broadcast(size, 0, group=_Control.group)
    data = torch.empty(int(size), dtype=torch.uint8)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    if int(size):
        dist.broadcast(data, 0, group=_Control.group)
    if world.is_main:
        _Control.bytes_sent += (int(size) + 8) * (world.world_size - 1)
    return data.numpy().tobytes()


def exchange(world: World, value: Any) -> list[Any]:
    """`exchange_bytes` for a JSON value. Every rank; communicates."""
    return [json.loads(each) for each in exchange_bytes(world, json.dumps(value).encode())]


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
    report = None if failure is None else [type(failure).__name__, str(failure)]
    digest = told.same and _digest(told.same[1])
    everyone = exchange(world, [report, told.mine, digest])
    reports, told.everyone, digests = (list(each) for each in zip(*everyone, strict=True))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        if told.same:
            _require_same(world, *told.same, digests)
        return
    kind, message = reports[failed[0]]
    if len({tuple(reports[rank]) for rank in failed}) > 1 or len(failed) < world.world_size:
        ranks = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        message += f"\n(rank {failed[0]} of {world.world_size} while {stage}; failed: rank {ranks})"
    says_no_more = isinstance(failure, errors.ZeroSftError)
    raise _rebuilt(kind, message) from None if says_no_more else failure


def _await_all(stage: str, timeout: datetime.timedelta) -> None:
    try:
        dist.monitored_barrier(group=_Control.group, timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise errors.DistributedError(
            f"not every rank came to the end of '{stage}' within {timeout}: {error}. A rank has died, or its storage hangs; "
            "its own log says more."
        ) from error


def _rebuilt(kind: str, message: str) -> errors.ZeroSftError:
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.ZeroSftError):
        return cls(message)
    return errors.DistributedError(f"{kind}: {message}")


def by_turns(
    world: World, stage: str, act: Callable[[], T], *, one_by_one: bool, timeout: datetime.timedelta = STAGE_TIMEOUT
) -> T:
    """`act` on every rank, `agreed`; `one_by_one`: on rank 0 first, then on a rank of each node, then on the others.

    That is for what one rank leaves in a folder that others may share: transformers copies custom code to one, data is
    prepared into one. Each turn may take `timeout`. Every rank; communicates.
    """
    turns = 3 if one_by_one else 1
    mine = min(turns - 1, 0 if world.is_main else 1 if world.local_rank == 0 else 2)
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
    raise errors.DistributedError(
        f"the ranks disagree about the {what}:\n" + "\n".join(lines) + "\nGive every rank the same files and arguments."
    )


def leave_with(error: BaseException, world: World) -> int:
    """Say `error` once, on rank 0 or the only rank that has it, and return the exit status. For the outermost handler."""
    lone = getattr(error, "lone", False)
    if world.is_main or lone:
        sys.stderr.write(f"\nerror: {error}{f' (rank {world.rank} alone)' * lone}\n")
        sys.stderr.flush()
    return 1
