"""Join the ranks: DeepSpeed's default process group, then this package's control group.

DeepSpeed and accelerate read the rank only from the environment. So this module sets RANK, WORLD_SIZE, LOCAL_RANK and
LOCAL_WORLD_SIZE, and MASTER_ADDR and MASTER_PORT where the launcher has not. They stay set until the process ends.
"""

import contextlib
import errno
import logging
import os
import re
import socket
from typing import Any

import deepspeed
import psutil
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from zero_sft.cluster.control_group import init_control_group
from zero_sft.cluster.deepspeed_command import free_port
from zero_sft.cluster.node_layout import SHARED_MEMORY
from zero_sft.cluster.rendezvous import meeting_place
from zero_sft.cluster.world import World
from zero_sft.errors import ConfigError, Scope
from zero_sft.printable import with_count
from zero_sft.zero.operators import install_operator_builder

logger = logging.getLogger(__name__)


def connect(world: World) -> World:
    """Join the default process group (started by DeepSpeed if there is none) and the control group. Every rank; communicates.

    Returns:
        The world with the nodes that the ranks have agreed on. Everything that depends on a node must use this one.

    Raises:
        ConfigError: there is no master address, its port is taken, or two ranks of a node would use the same GPU.
        DistributedError: a process group with another size or rank already exists.
    """
    owns_default_group = not dist.is_initialized()
    if owns_default_group:
        _start_default_group(world)
    connected = init_control_group(world, _devices(), owns_default_group=owns_default_group)
    os.environ["LOCAL_RANK"] = str(connected.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(connected.local_world_size)
    return connected


def _devices() -> str:
    """Describe the devices that this rank sees: "cpu", or the kind of device and the visible numbers ("all" if unset)."""
    accelerator: Any = get_accelerator()
    kind = str(accelerator.device_name())
    return kind if kind == "cpu" else f"{kind} {os.environ.get(accelerator.visible_devices_envs()[0], 'all')}"


def require_own_device(world: World) -> None:
    """Check that this rank sees the device that DeepSpeed will use: the one whose number is its local rank.

    Raises:
        ConfigError: the rank sees too few devices. Only the first such rank of each node reports it.
    """
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu" and world.local_rank >= (count := accelerator.device_count()):
        raise ConfigError(
            f"rank {world.rank} has local rank {world.local_rank}, but sees {with_count(count, 'device')}. Start as many "
            "ranks on a node as it has devices, and let every rank see all of them: under SLURM, ask for --gpus-per-node, not "
            "for --gpus-per-task or --gpu-bind, and don't set CUDA_VISIBLE_DEVICES for each rank.",
            code="cluster.rank_without_device",
            scope=Scope.THIS_RANK if world.local_rank == count else Scope.UNKNOWN,  # the node's first rank without a device
        )


def _start_default_group(world: World) -> None:
    require_own_device(world)
    install_operator_builder()
    set_meeting_place(world)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise port_taken(int(os.environ["MASTER_PORT"])) from error
    dist.barrier()
    _unlink_shared_memory(world.rank)


def set_meeting_place(world: World) -> None:
    """Set the variables by which the ranks find each other, where the launcher has not. Any rank; does not communicate.

    Raises:
        ConfigError: there is no master address.
    """
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with `accelerate launch --cpu`, accelerate would leave DeepSpeed out
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    if world.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    os.environ.update(meeting_place(world, os.environ))
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ConfigError(
            f"{' and '.join(absent)} not set in the environment, so the ranks can't find each other. Start the job with "
            "./launch.sh, which derives both, or export MASTER_ADDR and MASTER_PORT.",
            code="cluster.no_master_address",
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"MASTER_PORT={port} is not a port: a number from 1 to 65535. Unset it, and start the job with ./launch.sh, which "
            "chooses one.",
            code="cluster.bad_port",
        )
    if world.is_main and world.world_size > 1 and not _is_own_address(address):
        logger.warning(
            "MASTER_ADDR=%s does not look like an address of %s, where rank 0 runs: if the ranks wait for each other, name an "
            "address of it", address, socket.gethostname(),
        )  # fmt: skip


def _is_own_address(address: str) -> bool:
    """Return whether a name is that of this machine; True if that can't be known."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def _unlink_shared_memory(rank: int) -> None:
    """Remove DeepSpeed's file of this rank in shared memory, which every rank has mapped by now.

    On CPU ranks, DeepSpeed's communication backend creates one file of about 69 MB per rank and never removes it. The files are
    named after the user and the master's address and port, so they accumulate over runs and fill the node's memory. A mapped
    file can be unlinked: its memory is freed when the last process that maps it ends, however that happens.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with contextlib.suppress(FileNotFoundError, PermissionError):
        (SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink()


def port_taken(port: int) -> ConfigError:
    """Make the error of rank 0, the only rank that listens on the master port."""
    return ConfigError(
        f"the master port {port} of {socket.gethostname()} is taken{_listener(port)}. Use another port for this job: "
        f"--master_port {free_port()} (with deepspeed, before the module's name), or start it with ./launch.sh and no port: "
        "it chooses a free one.",
        code="cluster.port_taken",
        scope=Scope.THIS_RANK,
    )


def _listener(port: int) -> str:
    """Describe the process that listens on a port, as in " by process 12 (python -m x)"; "" if this user can't see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:120]})"
    return ""
