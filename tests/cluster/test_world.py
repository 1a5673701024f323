"""Tests of the rank and world size that each launcher's variables define."""

import pytest

from tests.errors import raises
from zero_sft.cluster.world import World

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "deepspeed": DEEPSPEED,
    "Open MPI": OPEN_MPI,
    "MVAPICH": MVAPICH,
    "MPICH": HYDRA,
    "srun": SLURM,
    "srun --mpi=pmi2": {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    # srun starts one torchrun, deepspeed or orted on each node, and these start the ranks
    "torchrun in srun": {**SLURM, **TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
    "mpirun in srun": {**SLURM, **OPEN_MPI, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
    # variables of another launcher, left in the shell
    "deepspeed over torchrun's": {"LOCAL_WORLD_SIZE": "8", **DEEPSPEED},
    "torchrun over deepspeed's": {"LOCAL_SIZE": "1", "CROSS_RANK": "0", **TORCHRUN},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_of_a_launcher(launcher):
    assert World.detect(LAUNCHERS[launcher]) == World(rank=3, world_size=8, local_rank=1, local_world_size=2)


def test_no_launcher_is_one_process():
    assert World.detect({"HOME": "/root"}) == World()
    assert World.detect({"RANK": "", "WORLD_SIZE": ""}) == World()


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script, which is outside of any step
        # the shell of salloc, which is a step with a reserved number, and the step of a batch script
        {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "4294967291"},
        # srun --pty bash in an allocation of 8 tasks
        {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
    ids=["batch", "salloc", "batch step", "pty"],
)
def test_what_slurm_leaves_in_a_shell_is_one_process(env):
    assert World.detect(env) == World()


def test_shell_of_a_step_of_several_tasks(monkeypatch):
    """In `srun -n 8 --pty bash` a user's program has the terminal; the tasks of a step that the shell starts do not."""
    env = {**SLURM, "SLURM_PTY_PORT": "40000"}
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert World.detect(env) == World()
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert World.detect(env).world_size == 8


@pytest.mark.parametrize(("node", "tasks"), [("0", 2), ("2", 2), ("3", 3), ("4", 1)])
def test_uneven_nodes_of_slurm(node, tasks):
    env = {**SLURM, "SLURM_LOCALID": "0", "SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": "2(x3),3,1"}
    assert World.detect(env).local_world_size == tasks


@pytest.mark.parametrize(
    ("env", "code", "values"),
    [
        ({"RANK": "x", "WORLD_SIZE": "8"}, "bad_launcher_variables", ("RANK=x",)),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "bad_launcher_variables", ("RANK is", "below WORLD_SIZE")),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "bad_launcher_variables", ("LOCAL_RANK is", "below LOCAL_WORLD_SIZE")),
        ({**DEEPSPEED, "LOCAL_SIZE": "16"}, "bad_launcher_variables", ("LOCAL_SIZE is larger than WORLD_SIZE",)),
        ({"WORLD_SIZE": "8"}, "launcher_variable_missing", ("WORLD_SIZE=8", "but RANK")),
        ({"RANK": "3"}, "launcher_variable_missing", ("RANK=3", "but WORLD_SIZE")),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "bad_launcher_variables", ("'two'",)),
    ],
)
def test_unusable_variables(env, code, values):
    with raises(f"cluster.{code}", *values):
        World.detect(env)


def test_groups_of_hpz_stay_inside_nodes():
    def size(*leaders: int) -> int:
        most = max(leaders.count(leader) for leader in leaders)
        return World(world_size=len(leaders), local_world_size=most, node_leaders=leaders).node_group_size

    assert size(0, 0, 0, 0) == 4
    assert size(0, 0, 2, 2) == 2
    assert size(0, 0, 0) == 3
    assert size(0, 0, 0, 3) == 1  # uneven
    assert size(0, 0, 0, 0, 4, 4) == 2
    assert size(0, 1, 0, 1) == 1  # assigned round-robin
