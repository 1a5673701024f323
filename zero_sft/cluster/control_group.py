"""All-gather and broadcast of small payloads on the CPU, over a gloo group that this package creates.

All communication of this package uses this group, never NCCL. The group works before a GPU is touched, its waiting does not
count against the training group's timeout, and a closed socket reveals a dead peer. Payloads are bytes or JSON, never pickles.
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
"""Bytes that each rank sends in the first round of an all-gather: 8 bytes of length, then the payload if it fits."""

DOWNLOAD_TIMEOUT = datetime.timedelta(hours=24)
"""Longest time that ranks wait while another rank downloads."""


@dataclass(slots=True, kw_only=True)
class ControlGroup:
    """A gloo group of all ranks, the default group that existed when it was created, and the world that the ranks agreed on."""

    group: Any
    default_group: Any
    owns_default_group: bool
    world: World | None = None


_control: ControlGroup | None = None  # set by `init_control_group`, cleared by `destroy_control_group`
_bytes_sent = 0  # by this process, in all exchanges; never reset


def init_control_group(world: World, devices: str, *, owns_default_group: bool) -> World:
    """Create the control group, once per default group. Every rank; communicates.

    Args:
        devices: the devices that this rank may use, for `describe_rank`.
        owns_default_group: True if this package created the default group and destroys it with the control group.

    Returns:
        The world with the node layout that the ranks agreed on. Code that depends on nodes must use this world.

    Raises:
        ConfigError: two ranks of a node would use the same GPU.
        DistributedError: the default group has another size or rank than this world.
    """
    global _control
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.world_size):
        raise errors.DistributedError(
            f"torch.distributed reports rank {dist.get_rank()} of {dist.get_world_size()}, but the launcher's variables say "
            f"rank {world.rank} of {world.world_size}. Don't create a process group of another size before loading: "
            "ZeRO-3 would silently leave the model unsharded.",
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
    node_ranks = [rank for rank, rank_leader in enumerate(world.node_leaders) if rank_leader == leader]
    return open_board(leader, world.rank, node_ranks, lambda value: all_gather_json(world, value))


def control_group() -> Any:
    """Return the gloo group of this package, or None before `init_control_group`. Any rank; does not communicate."""
    return None if _control is None else _control.group


def destroy_control_group() -> None:
    """Destroy the gloo groups of this package. Registered with `atexit`; does not wait for other ranks.

    Otherwise their threads outlive the interpreter and can abort its exit with "terminate called".
    """
    global _control
    if dist.is_initialized() and _control is not None and _control.default_group is dist.group.WORLD:
        is_gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group(None if _control.owns_default_group and is_gloo else _control.group)
    _control = None


def bytes_communicated() -> int:
    """Return the bytes that this rank has sent through this module since the process began."""
    return _bytes_sent


def all_gather_bytes(world: World, payload: bytes) -> list[bytes]:
    """Return the `payload` of every rank, in rank order. Every rank; communicates."""
    if world.world_size == 1:
        return [payload]
    # A short payload is sent together with its length: one round instead of two.
    head = torch.zeros(_SHORT_BYTES, dtype=torch.uint8)
    head[:8] = torch.frombuffer(bytearray(len(payload).to_bytes(8, "little")), dtype=torch.uint8)
    if 0 < len(payload) <= _SHORT_BYTES - 8:
        head[8 : 8 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    heads = _all_gather(head, world)
    sizes = [int.from_bytes(head[:8].numpy().tobytes(), "little") for head in heads]
    longest = max(sizes)
    if longest <= _SHORT_BYTES - 8:
        return [head[8 : 8 + size].numpy().tobytes() for head, size in zip(heads, sizes, strict=True)]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else padded[:0]
    return [gathered[:size].numpy().tobytes() for gathered, size in zip(_all_gather(padded, world), sizes, strict=True)]


def _all_gather(local: torch.Tensor, world: World) -> list[torch.Tensor]:
    """Return the tensor of every rank, in rank order; all have the same size. Every rank; communicates."""
    received = [torch.empty_like(local) for _ in range(world.world_size)]
    dist.all_gather(received, local, group=control_group())
    global _bytes_sent
    _bytes_sent += local.numel() * (world.world_size - 1)
    return received


def broadcast_bytes(world: World, payload: bytes | None) -> bytes:
    """Return the payload of rank 0 on every rank; the other ranks pass None. Every rank; communicates."""
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
    """Return the JSON `value` of every rank, in rank order. Every rank; communicates."""
    return [json.loads(payload) for payload in all_gather_bytes(world, json.dumps(value).encode())]
