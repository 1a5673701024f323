"""Find out which ranks share a node, from the hosts that they run on and not from the launcher's variables.

Ranks share a node if they have the same boot id, host name and `/dev/shm`, because they exchange files in shared memory. Two
containers on one machine count as two nodes; so do two machines that are both called "localhost". `describe_rank` reads
from this machine; `place_in_layout` is pure.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zero_sft import errors
from zero_sft.cluster.world import World

SHARED_MEMORY = Path("/dev/shm")
"""The folder in which the ranks of a node exchange files."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def describe_rank(world: World, devices: str) -> dict[str, Any]:
    """Return the JSON-able description that a rank sends to the others.

    Args:
        devices: "cpu", or the kind of device and the visible ones.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "host": _host_identity(),
        "name": socket.gethostname(),
        "local_rank": world.local_rank,
        "devices": devices,
        "cpus": f"{sum(1 << cpu for cpu in cpus):x}",
    }


def _host_identity() -> str:
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    memory = SHARED_MEMORY.stat().st_dev if SHARED_MEMORY.is_dir() else ""
    return f"{boot} {socket.gethostname()} {memory}"


def place_in_layout(world: World, descriptions: Sequence[Mapping[str, Any]]) -> World:
    """Return the world with its node layout.

    Args:
        descriptions: the `describe_rank` of every rank, in rank order.

    Raises:
        ConfigError: two ranks of a node would use the same GPU; the same error on every rank.
    """
    leader_of_host: dict[str, int] = {}
    leaders = tuple(leader_of_host.setdefault(description["host"], rank) for rank, description in enumerate(descriptions))
    clash = _first_clash(descriptions, leaders)
    local_rank = world.local_rank
    if clash and all(description["devices"] == "cpu" for description in descriptions):
        local_rank = leaders[: world.rank].count(leaders[world.rank])  # CPU ranks can't clash over a device
    elif clash:
        first_rank, second_rank = clash
        raise errors.ConfigError(
            f"ranks {first_rank} and {second_rank} both run on {descriptions[first_rank]['name']} with "
            f"LOCAL_RANK={descriptions[first_rank]['local_rank']}, so they would use the same GPU. Start the job with "
            "./launch.sh, deepspeed, torchrun or srun, or give each rank of a node its own LOCAL_RANK.",
            code="cluster.local_rank_shared",
        )
    node_ranks = [rank for rank, leader in enumerate(leaders) if leader == leaders[world.rank]]
    return replace(
        world,
        local_rank=local_rank,
        local_world_size=len(node_ranks),
        node_leaders=leaders,
        cpu_cores=_core_share(descriptions[world.rank]["cpus"], [descriptions[rank]["cpus"] for rank in node_ranks]),
    )


def _first_clash(descriptions: Sequence[Mapping[str, Any]], leaders: Sequence[int]) -> tuple[int, int] | None:
    """Return two ranks of a node that have the same device, or None."""
    seen: dict[tuple[Any, ...], int] = {}
    for rank, (description, leader) in enumerate(zip(descriptions, leaders, strict=True)):
        other = seen.setdefault((leader, description["local_rank"], description["devices"]), rank)
        if other != rank:
            return other, rank
    return None


def _core_share(cpus: str, node_cpus: Sequence[str]) -> int:
    """Return a rank's share of its CPU cores, at least 1. Each core is divided among the ranks of the node that may use it.

    Args:
        cpus: the rank's CPU mask in hexadecimal; `node_cpus` has those of all ranks of the node.
    """
    masks = [int(rank_cpus, 16) for rank_cpus in node_cpus]
    rank_mask = int(cpus, 16)
    cores = [core for core in range(rank_mask.bit_length()) if rank_mask >> core & 1]
    return max(1, int(sum(1 / sum(mask >> core & 1 for mask in masks) for core in cores) + 1e-9))
