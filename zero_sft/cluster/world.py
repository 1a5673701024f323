"""Rank, world size and node layout as plain data, detected once from the launcher's variables and passed in.

A launcher gives a rank its number and the number of ranks. The ranks themselves determine the nodes once they can communicate
(`cluster/node_layout.py`): launchers name these variables differently, set them wrongly for uneven nodes, or omit them.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from zero_sft import errors

_RESERVED_STEPS = 0xFFFFFFF0
"""First of the step ids that SLURM reserves, for batch scripts, node daemons and the shells of salloc."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The position of this process among the ranks: `0 <= rank < world_size`.

    `local_rank` comes from the launcher and is the index of the rank's device among the visible ones. `local_world_size` is the
    number of ranks on the rank's node. `node_leaders[r]` is the lowest rank on the node of rank `r`; it is empty before
    `init_control_group`. `cpu_cores` is the rank's share of the node's CPU cores.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_leaders: tuple[int, ...] = ()
    cpu_cores: int = 1

    @classmethod
    def alone(cls) -> "World":
        """Return the world of one rank, with which functions do not communicate."""
        return cls()

    @property
    def is_main(self) -> bool:
        """True on rank 0, which reports to the user."""
        return self.rank == 0

    @property
    def node_leader(self) -> int:
        """The rank that does the work that is needed once per node."""
        return self.node_leaders[self.rank] if self.node_leaders else self.rank - self.local_rank

    @property
    def leads_node(self) -> bool:
        """True on one rank of each node."""
        return self.rank == self.node_leader

    def leads_folder(self, *, on_each_node: bool) -> bool:
        """True on the rank that does the work that is needed once per output folder: rank 0, or one rank of each node."""
        return self.leads_node if on_each_node else self.is_main

    @property
    def node_group_size(self) -> int:
        """The largest n that divides `world_size` such that, for each i, ranks [i*n, (i+1)*n) are on one node."""
        if not self.node_leaders:
            return self.local_world_size
        return next(size for size in range(self.local_world_size, 0, -1) if self._groups_fit(size))

    def _groups_fit(self, size: int) -> bool:
        starts = range(0, self.world_size, size)
        return self.world_size % size == 0 and all(len(set(self.node_leaders[i : i + size])) == 1 for i in starts)

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "World":
        """Read the launcher's variables; without any, the world has one rank. Any rank; does not communicate.

        The order is: torchrun and DeepSpeed, Open MPI, MVAPICH, Hydra (MPICH, Intel MPI), a SLURM step. MPI comes before
        SLURM, because SLURM's variables then describe the processes that start the ranks.

        Raises:
            ConfigError: variables that are not numbers or contradict each other.
        """
        env = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
        # DeepSpeed's launcher sets CROSS_RANK; torchrun sets GROUP_RANK, and its LOCAL_WORLD_SIZE counts, not LOCAL_SIZE.
        started_by_deepspeed = "CROSS_RANK" in env and "GROUP_RANK" not in env
        for launcher in (_DEEPSPEED, *_LAUNCHERS) if started_by_deepspeed else _LAUNCHERS:
            is_srun = launcher is _HYDRA and "MPI_LOCALRANKID" not in env and _is_slurm_task(env)  # with --mpi=pmi2
            if launcher.rank in env and any(name in env for name in launcher.world_size) and not is_srun:
                return launcher.read(env)
        if _is_slurm_task(env):
            return _SLURM.read({**env, **_slurm_node_tasks(env)})
        _require_rank_and_world_size(env)
        return cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    """Names of a launcher's variables; where several are listed, the first one that is set is used."""

    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...]

    def read(self, env: Mapping[str, str]) -> World:
        """Return the world that the variables describe."""
        size_name, local_size_name = _first_set(env, self.world_size), _first_set(env, self.local_world_size)
        names = (self.rank, size_name, self.local_rank, local_size_name)
        try:
            rank, world_size = int(env[self.rank]), int(env[size_name])
            local_rank = int(env.get(self.local_rank, "0"))
            local_world_size = int(env.get(local_size_name, local_rank + 1))
        except (KeyError, ValueError) as error:
            raise _unusable(f"are not numbers ({error})", names, env) from error
        if not 0 <= rank < world_size:
            raise _unusable(f"contradict each other: {self.rank} is not below {size_name}", names, env)
        if not 0 <= local_rank < local_world_size:
            raise _unusable(f"contradict each other: {self.local_rank} is not below {local_size_name}", names, env)
        if local_world_size > world_size:
            raise _unusable(f"contradict each other: {local_size_name} is larger than {size_name}", names, env)
        return World(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


_DEEPSPEED = _Variables(rank="RANK", world_size=("WORLD_SIZE",), local_rank="LOCAL_RANK", local_world_size=("LOCAL_SIZE",))
_TORCHRUN = _Variables(
    rank="RANK", world_size=("WORLD_SIZE",), local_rank="LOCAL_RANK", local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
)
_OPEN_MPI, _MVAPICH = (
    _Variables(
        rank=f"{prefix}_RANK",
        world_size=(f"{prefix}_SIZE",),
        local_rank=f"{prefix}_LOCAL_RANK",
        local_world_size=(f"{prefix}_LOCAL_SIZE",),
    )
    for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
)
_HYDRA = _Variables(
    rank="PMI_RANK", world_size=("PMI_SIZE",), local_rank="MPI_LOCALRANKID", local_world_size=("MPI_LOCALNRANKS",)
)
_SLURM = _Variables(
    rank="SLURM_PROCID",
    world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    local_rank="SLURM_LOCALID",
    local_world_size=("_SLURM_NODE_TASKS",),
)
_LAUNCHERS = (_TORCHRUN, _OPEN_MPI, _MVAPICH, _HYDRA)


def _first_set(env: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in env), names[0])


def _unusable(problem: str, names: tuple[str, ...], env: Mapping[str, str]) -> errors.ConfigError:
    values = ", ".join(f"{name}={env.get(name, '(not set)')}" for name in names)
    return errors.ConfigError(
        f"the launcher's variables {problem}. Found: {values}. Start the job with ./launch.sh, deepspeed, torchrun, mpirun or "
        "srun, and unset variables left by a former job.",
        code="cluster.bad_launcher_variables",
    )


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Return True in a task that srun started, False in a batch script or a shell of `salloc` or `srun --pty`.

    Such a shell has the variables of a task and passes them on to every program.
    """
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in env or not step.isdigit() or int(step) >= _RESERVED_STEPS:
        return False
    return not ("SLURM_PTY_PORT" in env and sys.stdin is not None and sys.stdin.isatty())


def _slurm_node_tasks(env: Mapping[str, str]) -> dict[str, str]:
    """Return the number of tasks on this node, from SLURM's list for all nodes. Worked example: "2(x3),1" on node 3 → 1."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or ""
    tasks: list[str] = []
    for part in listed.split(",") if listed else ():
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise errors.ConfigError(
                f"SLURM's list of tasks per node can't be parsed: {listed!r}. Start the job with srun.",
                code="cluster.bad_launcher_variables",
            )
        tasks += [match[1]] * int(match[2] or 1)
    node = int(env["SLURM_NODEID"]) if env.get("SLURM_NODEID", "").isdigit() else 0
    return {"_SLURM_NODE_TASKS": tasks[min(node, len(tasks) - 1)]} if tasks else {}


def _require_rank_and_world_size(env: Mapping[str, str]) -> None:
    """Raise if only one of RANK and WORLD_SIZE is set, unless it has the value of a single process."""
    for name, other, single_value in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if env.get(name, single_value) != single_value and other not in env:
            raise errors.ConfigError(
                f"{name}={env[name]} is set, but {other} is not. Start the job with ./launch.sh, deepspeed, torchrun, mpirun "
                f"or srun; for a single process, unset {name}.",
                code="cluster.launcher_variable_missing",
            )
