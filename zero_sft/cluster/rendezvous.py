"""The address and the port at which the ranks meet, where the launcher sets none: under srun and under mpirun.

Pure, apart from the parent's process id. Imports neither torch nor transformers.
"""

import os
import re
from collections.abc import Mapping

from zero_sft.cluster.world import World

FIRST_PORT, PORTS = 20_000, 12_000
"""Ports below those that the kernel gives to client sockets, from 32768 on."""

_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")


def hosts_of_list(node_list: str) -> list[str]:
    """Return the hosts of one of SLURM's lists, in its order.

    Worked example: "gpu[07-09,12],login1" → gpu07, gpu08, gpu09, gpu12, login1; "r[0-1]n[1-2]" → r0n1, r0n2, r1n1, r1n2.
    """
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return [host for part in parts for host in _expanded(part)]


def _expanded(part: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    numbers: list[str] = []
    for item in match[1].split(","):
        first, _, last = item.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return [part[: match.start()] + number + rest for number in numbers for rest in _expanded(part[match.end() :])]


def meeting_place(world: World, environ: Mapping[str, str]) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT, as far as they are not set and can be derived; the same on every rank.

    Args:
        environ: the variables of the launcher.
    """
    address, port = _derived(world, environ)
    derived = {"MASTER_ADDR": address, "MASTER_PORT": port}
    return {name: value for name, value in derived.items() if value and not environ.get(name)}


def _derived(world: World, environ: Mapping[str, str]) -> tuple[str, str]:
    nodes, job, step = (environ.get(name, "") for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"))
    is_srun = nodes and job.isdecimal() and step.isdecimal() and "MPI_LOCALRANKID" not in environ  # sets PMI_RANK as well
    if any(environ.get(name) for name in (_MPI_RANKS[:2] if is_srun else _MPI_RANKS)):
        # mpirun is the parent of all ranks of a machine. It tells ranks of other machines nothing about the first one.
        is_one_machine = world.local_world_size == world.world_size
        return ("127.0.0.1", str(FIRST_PORT + os.getppid() % PORTS)) if is_one_machine else ("", "")
    if nodes and job.isdecimal() and step.isdecimal():
        return hosts_of_list(nodes)[0], str(FIRST_PORT + (int(job) + 997 * int(step)) % PORTS)
    return "", ""
