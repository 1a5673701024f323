"""Small exchanges on the CPU: all ranks' bytes or JSON values, over a gloo group that this package makes for itself.

All traffic of this package goes through it, never through NCCL: it works before a GPU is touched, its waiting does not run
on the training group's clock, and a dead peer is noticed by its closed socket. Payloads are bytes or JSON, never pickles.
"""

import atexit
import contextlib
import datetime
import json
import os
import socket
from typing import Any

import psutil
import torch
import torch.distributed as dist

from zero_sft import errors
from zero_sft.cluster import failure
from zero_sft.cluster.board import NodeBoard, open_board
from zero_sft.cluster.layout import describe_rank, place_in_layout
from zero_sft.world import World

_SHORT_BYTES = 256
"""What the first round of an exchange carries of each rank: 8 bytes of length, and the payload where it fits."""

DOWNLOAD_TIMEOUT = datetime.timedelta(hours=24)
"""How long ranks wait for a download by another rank."""


class _Control:
    """The gloo group of this package and what has gone through it; made again when the default group changes."""

    group: Any = None
    parent: Any = None
    world: World | None = None
    bytes_sent: int = 0
    owns_default_group: bool = False


def connect(world: World) -> World:
    """Join the default process group (made by DeepSpeed if nobody has) and make the control group. Every rank; communicates.

    Returns:
        The world with the nodes that the ranks have agreed on. Whatever depends on a node needs this one.

    Raises:
        ConfigError: two ranks of a node would take the same GPU.
        DistributedError: a process group exists already whose size or rank is not this world's.
    """
    if not dist.is_initialized():
        _start_default_group(world)
        _Control.owns_default_group = True
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.world_size):
        raise errors.DistributedError(
            f"torch.distributed says rank {dist.get_rank()} of {dist.get_world_size()}, the launcher's variables say rank "
            f"{world.rank} of {world.world_size}. Don't make a process group of another size before the load: ZeRO-3 would "
            "silently keep the model whole.",
            code="cluster.process_group_of_another_size",
        )
    default = dist.group.WORLD
    if _Control.group is None or _Control.parent is not default:
        if _Control.group is None:
            atexit.register(disconnect)
        _Control.group = dist.new_group(backend="gloo", timeout=DOWNLOAD_TIMEOUT)
        _Control.parent, _Control.world = default, None
    if _Control.world is None:
        ranks = exchange(world, describe_rank(world, _devices()))
        _Control.world = place_in_layout(world, ranks)
        # accelerate and DeepSpeed read them again
        os.environ["LOCAL_RANK"] = str(_Control.world.local_rank)
        os.environ["LOCAL_WORLD_SIZE"] = str(_Control.world.local_world_size)
        failure.set_board(_Control.world, _open_board(_Control.world))
    return _Control.world


def _open_board(world: World) -> NodeBoard | None:
    leader = world.node_leader
    mates = [rank for rank, other in enumerate(world.node_leaders) if other == leader]
    return open_board(leader, world.rank, mates, lambda value: exchange(world, value))


def control_group() -> Any:
    """The gloo group of this package; None before `connect`."""
    return _Control.group


def _devices() -> str:
    """ "cpu", or the kind of device and the numbers of the visible ones."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    kind = str(accelerator.device_name())
    return kind if kind == "cpu" else f"{kind} {os.environ.get(accelerator.visible_devices_envs()[0], 'all')}"


def disconnect() -> None:
    """Leave the gloo groups that `connect` made, at the program's end. Does not wait for other ranks.

    Threads of theirs that live on into the interpreter's exit may end it with "terminate called".
    """
    if dist.is_initialized() and _Control.parent is dist.group.WORLD and _Control.group is not None:
        is_gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group(None if _Control.owns_default_group and is_gloo else _Control.group)
    _Control.group, _Control.parent, _Control.world, _Control.owns_default_group = None, None, None, False


def _start_default_group(world: World) -> None:
    """DeepSpeed reads the rank from the environment alone, so what SLURM or a lone process lacks is written there."""
    import deepspeed

    from zero_sft.zero.devices import require_own_device
    from zero_sft.zero.operators import keep_operators_apart
    from zero_sft.zero.shared_memory import unlink_own

    require_own_device(world)
    keep_operators_apart()
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    if world.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if "MASTER_ADDR" not in os.environ:
        raise errors.ConfigError(
            "MASTER_ADDR is not set, so the ranks can't find each other. Start the job with ./launch.sh, which derives it, "
            "or export MASTER_ADDR and MASTER_PORT.",
            code="cluster.no_master_address",
        )
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise _port_is_taken(int(os.environ["MASTER_PORT"])) from error
    dist.barrier()
    unlink_own(world.rank)


def _port_is_taken(port: int) -> errors.ConfigError:
    """The error of rank 0, which alone listens."""
    error = errors.ConfigError(
        f"the master port {port} of {socket.gethostname()} is taken{_who_listens(port)}. Give this job another: "
        f"--master_port {_free_port()} (with deepspeed, before the module's name), or leave it out with ./launch.sh, which "
        "chooses a free one.",
        code="cluster.port_taken",
    )
    error.lone = True
    return error


def _who_listens(port: int) -> str:
    """ " by process 12 (python -m x)", if this user may know it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:120]})"
    return ""


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
