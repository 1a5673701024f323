"""`launch.sh` in a SLURM job: what gets to srun and to the ranks."""

import pytest

from tests.launch_sh.machine import ALLOCATION, FREE_PORT, NODES


def option(argv: list[str], name: str) -> str | None:
    """The value of one of srun's own options, which all are written with `=`."""
    for word in argv:
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
        if not word.startswith("--"):
            break
    return None


def test_one_task_a_gpu(machine):
    machine.run("--model_name_or_path", "x", "--run_name", "two words", **ALLOCATION)
    srun = machine.argv("srun")
    wanted = {"nodes": "2", "ntasks": "4", "ntasks-per-node": "2", "cpus-per-task": "4", "gpus-per-node": "2"}
    assert {name: option(srun, name) for name in wanted} == wanted
    assert option(srun, "kill-on-bad-exit") == "1"
    env = machine.env("srun")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", str(20000 + 12345 % 12000))
    assert env["OMP_NUM_THREADS"] == "4"
    assert "deepspeed" not in machine.started()


def test_ranks_are_expanded_inside_the_step(machine):
    machine.run("--run_name", "two words", "$HOME", **ALLOCATION)
    assert "$SLURM_PROCID" in "\n".join(machine.argv("srun"))
    assert "RANK" not in machine.env("srun")
    assert machine.started() == ["rank0", "rank1", "rank2", "rank3", "srun"]
    for rank in range(4):
        assert machine.argv(f"rank{rank}") == ["-u", "-m", "zero_sft.train", "--run_name", "two words", "$HOME"]
        env = machine.env(f"rank{rank}")
        numbers = [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
        assert numbers == [str(rank), str(rank % 2), "4", "2"]
        assert env["MASTER_ADDR"] == "node7"
        assert env["PYTHONPATH"] == str(machine.project)


def test_status_of_the_step_is_passed_on(machine):
    machine.run(FAKE_EXIT="17", status=17, **ALLOCATION)
    assert "rank0" in machine.started()
    assert "deepspeed" not in machine.started()


def test_one_task_a_node_on_nodes_of_eight_gpus(machine):
    """The usual mistake: one task a node, as a launcher would want it."""
    printed = machine.run(
        **{
            **ALLOCATION,
            "SLURM_TASKS_PER_NODE": "1(x2)",
            "SLURM_JOB_CPUS_PER_NODE": "64(x2)",
            "FAKE_NODES": NODES + "gpu:8(IDX:0-7)",
        }
    )
    assert "tasks per node" not in printed
    srun = machine.argv("srun")
    assert [option(srun, name) for name in ("ntasks", "ntasks-per-node", "cpus-per-task")] == ["16", "8", "8"]
    assert machine.env("rank15")["LOCAL_RANK"] == "7"


def test_fewer_cpus_than_ranks(machine):
    printed = machine.refuse(
        "too_few_cpus",
        **{
            **ALLOCATION,
            "SLURM_TASKS_PER_NODE": "1(x2)",
            "SLURM_JOB_CPUS_PER_NODE": "1(x2)",
            "FAKE_NODES": NODES + "gpu:8(IDX:0-7)",
        },
    )
    assert "(1)" in printed
    assert "--cpus-per-task=" in printed


@pytest.mark.parametrize("gres", ["", "shard:2(IDX:0)"])
def test_one_rank_a_task_without_gpus(machine, gres):
    machine.run(**{**ALLOCATION, "SLURM_TASKS_PER_NODE": "3(x2)", "FAKE_NODES": NODES + gres})
    srun = machine.argv("srun")
    assert [option(srun, name) for name in ("ntasks", "ntasks-per-node", "cpus-per-task")] == ["6", "3", "2"]
    assert option(srun, "gpus-per-node") is None


def test_nodes_that_differ(machine):
    gpus = f"{NODES}gpu:a100:2(IDX:0-1)\n{NODES}gpu:a100:4(IDX:0-3)"
    assert "(2, 4)" in machine.refuse("gpus_of_nodes_differ", **{**ALLOCATION, "FAKE_NODES": gpus})
    tasks = {**ALLOCATION, "FAKE_NODES": NODES, "SLURM_TASKS_PER_NODE": "3,2"}
    assert "(2, 3)" in machine.refuse("tasks_of_nodes_differ", **tasks)
    # CPUs may differ: every rank gets what the smallest node has for it
    machine.run(**{**ALLOCATION, "SLURM_JOB_CPUS_PER_NODE": "64,6"})
    assert option(machine.argv("srun"), "cpus-per-task") == "3"


def test_every_task_sees_all_gpus_of_its_node(machine):
    binding = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_CPUS_PER_GPU", "SLURM_GPU_BIND")
    machine.run(**ALLOCATION, **dict.fromkeys(binding, "1"))
    assert not set(binding) & set(machine.env("srun"))


def test_master_given_by_the_user(machine):
    machine.run("--master_port", "1234", "--master_addr=node8", "--lr", "1", **ALLOCATION)
    env = machine.env("rank3")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node8", "1234")
    assert machine.argv("rank3") == ["-u", "-m", "zero_sft.train", "--lr", "1"]


def test_options_of_the_launcher_on_one_machine_are_refused(machine):
    assert " --num_gpus " in machine.refuse("option_under_slurm", "--num_accelerators", "2", **ALLOCATION)


def test_shell_of_salloc_on_the_first_node(machine):
    machine.run(**ALLOCATION, SLURM_STEP_ID=str(0xFFFFFFFA), SLURM_STEP_NUM_TASKS="1")
    assert "srun" in machine.started()


def test_inside_a_step(machine):
    step = {**ALLOCATION, "SLURM_STEP_ID": "0"}
    machine.refuse("started_by_srun", **step, SLURM_STEP_NUM_TASKS="4")
    machine.run(**step, SLURM_STEP_NUM_TASKS="1")  # a shell from `srun --pty bash` is a machine like any other
    assert machine.started() == ["deepspeed"]


@pytest.mark.parametrize("known", ["command", "submit folder"])
def test_copy_in_the_spool_folder_finds_the_project(machine, tmp_path, known):
    spool = tmp_path / "spool" / "job12345"
    spool.mkdir(parents=True)
    machine.script = machine.script.rename(spool / "slurm_script")
    if known == "command":
        env = {"FAKE_COMMAND": f"{machine.project}/launch.sh --model_name_or_path /models/x", "SLURM_SUBMIT_DIR": "/"}
    else:
        env = {"FAKE_COMMAND": "(null)", "SLURM_SUBMIT_DIR": str(machine.project)}
    machine.run(**ALLOCATION, **env)
    assert machine.env("rank0")["PYTHONPATH"] == str(machine.project)
    assert str(machine.project / ".venv" / "bin" / "python") in machine.argv("srun")


def test_a_job_that_is_queued_again(machine):
    """Its arguments stay; the job finds its checkpoints by SLURM's variables."""
    printed = machine.run("--overwrite_output_dir", "True", **ALLOCATION, SLURM_RESTART_COUNT="2")
    assert "start 3 of job 12345" in printed
    assert machine.argv("rank0")[-2:] == ["--overwrite_output_dir", "True"]
    assert machine.env("rank0")["SLURM_RESTART_COUNT"] == "2"


@pytest.mark.parametrize(("most", "code"), [("2", "too_many_requeues"), ("many", "bad_max_requeues")])
def test_a_job_is_not_queued_again_for_ever(machine, most, code):
    machine.refuse(code, **ALLOCATION, SLURM_RESTART_COUNT="3", MAX_REQUEUES=most)


REQUEUES = """
    case "$*" in
      requeue*) record requeue "$@" ;;
      update*) record update "$@" ;;
      "show hostnames"*) printf '%s\\n' node7 node8 ;;
      "show job -d"*) echo "$FAKE_NODES" ;;
      "show job"*) printf '%s\\n' "JobId=12345 JobName=zero_sft" "   Comment=$FAKE_COMMENT" ;;
    esac"""
SIGNALLED = 'trap "" USR1; record srun "$@"; kill -USR1 "$ZERO_SFT_LAUNCHER_PID"; exit "$FAKE_EXIT"'


def signalled(machine, status, **env):
    """What the script prints when its step gets SIGUSR1 and ends with a status."""
    machine.add("scontrol", REQUEUES)
    machine.add("srun", SIGNALLED)
    machine.add("sleep", "exit 0")
    given = {"ENVIRONMENT": "BATCH", "FAKE_COMMENT": "", "FAKE_EXIT": str(status), **env}
    return machine.run(status=status, **{**ALLOCATION, **given})


def test_a_task_of_an_array_queues_itself_again_alone(machine):
    """The last task has the array's number as SLURM_JOB_ID, by which SLURM would queue all of them."""
    printed = signalled(machine, 75, SLURM_ARRAY_JOB_ID="12345", SLURM_ARRAY_TASK_ID="3")
    assert machine.argv("requeue") == ["requeue", "12345_3"]
    assert "the job goes on from its newest checkpoint" in printed


@pytest.mark.parametrize(("comment", "written"), [("", "1"), ("starts without training: 2", "3"), ("mine", None)])
def test_starts_that_were_signalled_before_they_trained(machine, comment, written):
    """They are counted in a row, in the job's comment if the user has none."""
    printed = signalled(machine, 138, FAKE_COMMENT=comment, SLURM_RESTART_COUNT="2")
    assert machine.argv("requeue") == ["requeue", "12345"]
    assert "the job starts again" in printed
    updated = ["update", "JobId=12345", f"Comment=starts without training: {written}"]
    assert machine.argv("update") == updated if written else "update" not in machine.started()


@pytest.mark.parametrize(("comment", "count"), [("starts without training: 3", "9"), ("mine", "3")])
def test_too_many_starts_without_training(machine, comment, count):
    printed = signalled(machine, 138, FAKE_COMMENT=comment, SLURM_RESTART_COUNT=count)
    assert "requeue" not in machine.started()
    assert "was signalled 4 times before it had trained" in printed


def test_a_start_that_has_trained_begins_the_count_again(machine):
    signalled(machine, 75, FAKE_COMMENT="starts without training: 3", SLURM_RESTART_COUNT="7")
    assert machine.argv("requeue") == ["requeue", "12345"]
    assert machine.argv("update")[-1] == "Comment=starts without training: 0"


def test_a_preflight_is_not_queued_again(machine):
    machine.add("scontrol", REQUEUES)
    machine.add("srun", SIGNALLED)
    machine.run("--preflight", status=75, **ALLOCATION, ENVIRONMENT="BATCH", FAKE_COMMENT="", FAKE_EXIT="75")
    assert "requeue" not in machine.started()


@pytest.mark.parametrize(("env", "code", "value"), [
    ({"SLURM_HET_SIZE": "2"}, "heterogeneous_job", "2"),
    ({"SLURM_JOB_NUM_NODES": ""}, "job_has_ended", "unset SLURM_JOB_ID"),
    ({"SLURM_JOB_ID": "999"}, "job_has_ended", "SLURM_JOB_ID=999"),
    ({"CONTAINER": "env A='1 2'"}, "container_quoted", "CONTAINER"),
])  # fmt: skip
def test_what_is_refused(machine, env, code, value):
    assert value in machine.refuse(code, **{**ALLOCATION, **env})


def test_ranks_that_end_early_have_one_status(machine):
    """srun kills the other ranks when one has a status that is not 0; so only rank 0 has it, and it waits for them."""
    machine.add("sleep", 'record "sleep" "$@"')
    machine.run(FAKE_EXIT="75", status=75, **ALLOCATION)
    assert machine.argv("sleep") == ["3"]


def test_a_dry_run_shows_the_step(machine):
    printed = machine.run("--dry_run", "--run_name", "two words", **ALLOCATION)
    assert "2 ranks on each of these nodes: node7 node8" in printed
    assert "MASTER_ADDR=node7 MASTER_PORT=20345" in printed
    assert "would start: srun --nodes=2 --ntasks=4" in printed
    assert r"two\ words" in printed
    assert machine.started() == []


def test_a_container(machine):
    machine.add("apptainer", 'record "box$RANK" "$@"')
    machine.run("--seed", "1", **ALLOCATION, CONTAINER="apptainer exec --nv image.sif")
    assert machine.argv("box3") == ["exec", "--nv", "image.sif", "python", "-u", "-m", "zero_sft.train", "--seed", "1"]


def test_a_container_that_is_missing(machine):
    machine.refuse("no_container", **ALLOCATION, CONTAINER="singularity exec x")


def test_the_preflight_is_the_same_step_with_another_module(machine):
    machine.run("--preflight", "--seed", "1", **ALLOCATION)
    assert machine.argv("rank1") == ["-u", "-m", "zero_sft.preflight", "--seed", "1"]


def test_a_port_that_is_taken_is_passed_over(machine):
    """The batch script runs on the first node, so it can look."""
    machine.run(**ALLOCATION, SLURMD_NODENAME="node7")
    assert machine.env("rank0")["MASTER_PORT"] == FREE_PORT
    machine.run(**ALLOCATION, SLURMD_NODENAME="login")
    assert machine.env("rank0")["MASTER_PORT"] == "20345"
