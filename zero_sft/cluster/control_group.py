"""Small exchanges on the CPU: all ranks' bytes or JSON values, over a gloo group that this package makes for itself.

All traffic of this package goes through it, never through NCCL: it works before a GPU is touched, its waiting does not run
on the training group's clock, and a dead peer is noticed by its closed socket. Payloads are bytes or JSON, never pickles.
"""

import atexit
import datetime
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from zero_sft import errors
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.node_board import NodeBoard, open_board
from zero_sft.cluster.node_layout import describe_rank, place_in_layout
from zero_sft.cluster.world import World

_SHORT_BYTES = 256
"""What the first round of an exchange carries of each rank: 8 bytes of length, and the payload where it fits."""

DOWNLOAD_TIMEOUT = datetime.timedelta(hours=24)
"""How long ranks wait for a download by another rank."""


@dataclass(slots=True, kw_only=True)
class ControlGroup:
    """A gloo group of all ranks, the default group that it was made next to, and the world that the ranks agreed on."""

    group: Any
    default_group: Any
    owns_default_group: bool
    world: World | None = None


_control: ControlGroup | None = None  # set by `init_control_group`, cleared by `destroy_control_group`
_bytes_sent = 0  # by the exchanges of this process; only ever counted up


def init_control_group(world: World, devices: str, *, owns_default_group: bool) -> World:
    """Make the control group, once per default group. Every rank; communicates.

    Args:
        devices: which devices this rank may use, for `describe_rank`.
        owns_default_group: whether this package has made the default group, and ends it with the control group.

    Returns:
        The world with the nodes that the ranks have agreed on. Whatever depends on a node needs this one.

    Raises:
        ConfigError: two ranks of a node would take the same GPU.
        DistributedError: the default group's size or rank is not this world's.
    """
    global _control
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.world_size):
        raise errors.DistributedError(
            f"torch.distributed says rank {dist.get_rank()} of {dist.get_world_size()}, the launcher's variables say rank "
            f"{world.rank} of {world.world_size}. Don't make a process group of another size before the load: ZeRO-3 would "
            "silently keep the model whole.",
            code="cluster.process_group_of_another_size",
        )
    default = dist.group.WORLD
    if _control is None or _control.default_group is not default:
        if _control is None:
            atexit.register(destroy_control_group)
        owns_default_group = owns_default_group or (_control is not None and _control.owns_default_group)
        group = dist.new_group(backend="gloo", timeout=DOWNLOAD_TIMEOUT)
        _control = ControlGroup(group=group, default_group=default, owns_default_group=owns_default_group)
    if _control.world is None:
        ranks = all_gather_json(world, describe_rank(world, devices))
        _control.world = place_in_layout(world, ranks)
        failure.set_board(_control.world, _open_board(_control.world))
    return _control.world


def _open_board(world: World) -> NodeBoard | None:
    leader = world.node_leader
    mates = [rank for rank, other in enumerate(world.node_leaders) if other == leader]
    return open_board(leader, world.rank, mates, lambda value: all_gather_json(world, value))


def control_group() -> Any:
    """The gloo group of this package; None before `init_control_group`."""
    return None if _control is None else _control.group


def destroy_control_group() -> None:
    """Destroy the gloo groups that were made here, at the program's end. Does not wait for other ranks.

    Their threads would live on into the interpreter's exit, and can abort it with "terminate called".
    """
    global _control
    if dist.is_initialized() and _control is not None and _control.default_group is dist.group.WORLD:
        is_gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group(None if _control.owns_default_group and is_gloo else _control.group)
    _control = None


def bytes_communicated() -> int:
    """Bytes that this rank has put into exchanges of this package since the process began."""
    return _bytes_sent


def all_gather_bytes(world: World, payload: bytes) -> list[bytes]:
    """Give every rank every rank's `payload`, in rank order. Every rank; communicates."""
    if world.world_size == 1:
        return [payload]
    # A short payload travels with its length: one round of messages instead of two.
    first = torch.zeros(_SHORT_BYTES, dtype=torch.uint8)
    first[:8] = torch.frombuffer(bytearray(len(payload).to_bytes(8, "little")), dtype=torch.uint8)
    if 0 < len(payload) <= _SHORT_BYTES - 8:
        first[8 : 8 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    heads = _all_gather(first, world)
    sizes = [int.from_bytes(head[:8].numpy().tobytes(), "little") for head in heads]
    longest = max(sizes)
    if longest <= _SHORT_BYTES - 8:
        return [head[8 : 8 + size].numpy().tobytes() for head, size in zip(heads, sizes, strict=True)]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else padded[:0]
    return [gathered[:size].numpy().tobytes() for gathered, size in zip(_all_gather(padded, world), sizes, strict=True)]


def _all_gather(mine: torch.Tensor, world: World) -> list[torch.Tensor]:
    """Every rank's tensor of the same size, in rank order. Every rank; communicates."""
    received = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(received, mine, group=control_group())
    global _bytes_sent
    _bytes_sent += mine.numel() * (world.world_size - 1)
    return received


def broadcast_bytes(world: World, payload: bytes | None) -> bytes:
    """Give every rank what rank 0 passes (the others pass None). Every rank; communicates."""
    global _bytes_sent
    if world.world_size == 1:
        return payload or b""
    size = torch.tensor([len(payload or b"")], dtype=torch.int64)
    dist.broadcast(size, 0, group=control_group())
    data = torch.empty(int(size), dtype=torch.uint8)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    if int(size):
        dist.broadcast(data, 0, group=control_group())
    if world.is_main:
        _bytes_sent += (int(size) + 8) * (world.world_size - 1)
    return data.numpy().tobytes()


def all_gather_json(world: World, value: Any) -> list[Any]:
    """`all_gather_bytes` for a JSON value. Every rank; communicates."""
    return [json.loads(payload) for payload in all_gather_bytes(world, json.dumps(value).encode())]
