"""Which ranks share a node: decided by the ranks together, from the hosts that they run on, whatever the launcher says.

Ranks share a node if they see the same boot of the same kernel, the same host name and the same `/dev/shm`: that is what
they need to hand each other files in memory. Two containers on one machine are two nodes, and so are two machines that are
both called "localhost". Pure, but for `describe_rank`.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zero_sft import errors
from zero_sft.cluster.world import World

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = Path("/dev/shm")


def describe_rank(world: World, devices: str) -> dict[str, Any]:
    """What a rank tells the others, JSON-able. `devices`: "cpu", or the kind of device and the visible ones."""
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
    memory = _SHARED_MEMORY.stat().st_dev if _SHARED_MEMORY.is_dir() else ""
    return f"{boot} {socket.gethostname()} {memory}"


def place_in_layout(world: World, ranks: Sequence[Mapping[str, Any]]) -> World:
    """The world with its nodes, as every rank's `describe_rank` tells, in rank order.

    Raises:
        ConfigError: two ranks of a node would take the same GPU; the same error on every rank.
    """
    first: dict[str, int] = {}
    leaders = tuple(first.setdefault(rank["host"], number) for number, rank in enumerate(ranks))
    clash = _first_clash(ranks, leaders)
    local_rank = world.local_rank
    if clash and all(rank["devices"] == "cpu" for rank in ranks):
        local_rank = leaders[: world.rank].count(leaders[world.rank])  # there is no device to clash about
    elif clash:
        one, other = clash
        raise errors.ConfigError(
            f"ranks {one} and {other} both run on {ranks[one]['name']} with LOCAL_RANK={ranks[one]['local_rank']}, so they "
            "would take the same GPU. Start the job with ./launch.sh, deepspeed, torchrun or srun, or give each rank of a "
            "node its own LOCAL_RANK.",
            code="cluster.local_rank_shared",
        )
    mates = [rank for rank, leader in zip(ranks, leaders, strict=True) if leader == leaders[world.rank]]
    return replace(
        world,
        local_rank=local_rank,
        local_world_size=len(mates),
        node_leaders=leaders,
        cpu_cores=_own_cores(ranks[world.rank]["cpus"], [mate["cpus"] for mate in mates]),
    )


def _first_clash(ranks: Sequence[Mapping[str, Any]], leaders: Sequence[int]) -> tuple[int, int] | None:
    """Two ranks of a node with the same device, or None."""
    seen: dict[tuple[Any, ...], int] = {}
    for number, (rank, leader) in enumerate(zip(ranks, leaders, strict=True)):
        other = seen.setdefault((leader, rank["local_rank"], rank["devices"]), number)
        if other != number:
            return other, number
    return None


def _own_cores(own: str, mates: Sequence[str]) -> int:
    """The cores that a rank may use, each shared among the ranks of the node that may use it: at least 1."""
    masks = [int(mate, 16) for mate in mates]
    own_mask = int(own, 16)
    if all(mask == own_mask for mask in masks):
        return max(1, own_mask.bit_count() // len(masks))
    cores = [core for core in range(own_mask.bit_length()) if own_mask >> core & 1]
    return max(1, int(sum(1 / sum(mask >> core & 1 for mask in masks) for core in cores) + 1e-9))
