"""All-gather and broadcast of small payloads on the CPU, over a gloo group that this package creates.

All exchanges of control data use this group, never NCCL. The group works before a GPU is touched, its waiting does not
count against the training group's timeout, and a closed socket reveals a dead peer. Payloads are bytes or JSON, never pickles.
"""

import atexit
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from zero_sft import errors
from zero_sft.cluster import failure_report
from zero_sft.cluster.node_board import open_board
from zero_sft.cluster.node_layout import describe_rank, place_in_layout
from zero_sft.cluster.world import World

_SHORT_BYTES = 256
"""Bytes that each rank sends in the first round of an all-gather: 8 bytes of length, then the payload if it fits."""

LONG_WAIT = datetime.timedelta(hours=24)
"""Longest time that ranks wait while another rank downloads or prepares data, and the control group's timeout."""


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
        group = dist.new_group(backend="gloo", timeout=LONG_WAIT)
        _control = ControlGroup(group=group, default_group=default, owns_default_group=owns_default_group)
    if _control.world is None:
        descriptions = all_gather_json(world, describe_rank(world, devices))
        _control.world = place_in_layout(world, descriptions)
        failure_report.set_board(_control.world, open_board(_control.world, all_gather_json))
    return _control.world


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
    heads = _all_gather(world, len(payload).to_bytes(8, "little") + payload[: _SHORT_BYTES - 8], _SHORT_BYTES)
    sizes = [int.from_bytes(head[:8], "little") for head in heads]
    longest = max(sizes)
    if longest <= _SHORT_BYTES - 8:
        return [head[8 : 8 + size] for head, size in zip(heads, sizes, strict=True)]
    return [padded[:size] for padded, size in zip(_all_gather(world, payload, longest), sizes, strict=True)]


def _all_gather(world: World, payload: bytes, nbytes: int) -> list[bytes]:
    """Return the payload of every rank, padded to `nbytes`, in rank order. Every rank; communicates."""
    global _bytes_sent
    local = _byte_tensor(payload.ljust(nbytes, b"\0"))
    received = [torch.empty_like(local) for _ in range(world.world_size)]
    dist.all_gather(received, local, group=control_group())
    _bytes_sent += nbytes * (world.world_size - 1)
    return [tensor.numpy().tobytes() for tensor in received]


def start_agreement(world: World, value: int) -> Callable[[], int]:
    """Begin to find the largest `value` of all ranks; the returned function waits for it. Every rank; communicates.

    With many ranks the answer takes longer than an all-reduce on devices, so the ranks compute meanwhile.
    """
    if world.world_size == 1:
        return lambda: value
    tensor = torch.tensor([value], dtype=torch.int32)
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=control_group(), async_op=True)

    def finish() -> int:
        if work is not None:
            work.wait()
        return int(tensor)

    return finish


def gather_tensors(world: World, local: torch.Tensor) -> list[torch.Tensor]:
    """Return the host tensor `local` of every rank on rank 0, and nothing on the others. Every rank; communicates.

    All are of one shape and dtype.
    """
    global _bytes_sent
    if world.world_size == 1:
        return [local]
    flat = local.contiguous().view(torch.uint8)  # gloo lacks some dtypes
    received = [torch.empty_like(flat) for _ in range(world.world_size)] if world.is_main else None
    dist.gather(flat, received, dst=0, group=control_group())
    _bytes_sent += 0 if world.is_main else flat.numel()
    return [row.view(local.dtype) for row in received or ()]


def all_gather_tensors(world: World, local: torch.Tensor) -> list[torch.Tensor]:
    """Return the host tensor `local` of every rank, in rank order. All are of one shape and dtype. Every rank; communicates."""
    global _bytes_sent
    if world.world_size == 1:
        return [local]
    flat = local.contiguous().view(torch.uint8)
    received = [torch.empty_like(flat) for _ in range(world.world_size)]
    dist.all_gather(received, flat, group=control_group())
    _bytes_sent += flat.numel() * (world.world_size - 1)
    return [row.view(local.dtype) for row in received]


def broadcast_bytes(world: World, payload: bytes | None) -> bytes:
    """Return the payload of rank 0 on every rank; the other ranks pass None. Every rank; communicates."""
    global _bytes_sent
    if world.world_size == 1:
        return payload or b""
    size = torch.tensor([len(payload or b"")], dtype=torch.int64)
    dist.broadcast(size, 0, group=control_group())
    nbytes = int(size)
    if world.is_main:
        _bytes_sent += (nbytes + 8) * (world.world_size - 1)
    if nbytes == 0:
        return b""
    data = _byte_tensor(payload or bytes(nbytes))
    dist.broadcast(data, 0, group=control_group())
    return data.numpy().tobytes()


def _byte_tensor(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def all_gather_json(world: World, value: Any) -> list[Any]:
    """Return the JSON `value` of every rank, in rank order. Every rank; communicates."""
    return [json.loads(payload) for payload in all_gather_bytes(world, json.dumps(value).encode())]
