"""`launch.sh` with stand-ins for everything it starts or asks: what gets to the launcher, to srun and to the ranks."""

import ast
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "launch.sh"
TOOLS = ("bash", "awk", "cat", "dirname", "env", "grep", "readlink", "sed", "sort", "tr")
FREE_PORT = "45678"
CPUS = 8  # of "this machine"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# NAME.argv and NAME.env in the folder $RECORD
RECORD = """#!/bin/bash
record() { printf '%s\\0' "${@:2}" >"$RECORD/$1.argv"; env -0 >"$RECORD/$1.env"; }
"""
FAKES = {
    "deepspeed": 'record deepspeed "$@"; exit "${FAKE_EXIT:-0}"',
    # Asked for a free port, or a rank of a step.
    "python": f'if [[ $1 == -c ]]; then echo {FREE_PORT}; else record "rank$RANK" "$@"; exit "${{FAKE_EXIT:-0}}"; fi',
    # Like srun, it gives each task its own numbers, over those of the batch script. One task after the other.
    "srun": """
        record srun "$@"
        while [[ $1 == --* ]]; do
          case $1 in --ntasks=*) tasks=${1#*=} ;; --ntasks-per-node=*) width=${1#*=} ;; esac
          shift
        done
        worst=0
        for ((task = 0; task < tasks; task++)); do
          SLURM_PROCID=$task SLURM_LOCALID=$((task % width)) SLURM_NTASKS=$tasks SLURM_STEP_ID=0 "$@" || worst=$?
        done
        exit $worst""",
    "scontrol": """
        case "$*" in
          "show hostnames node[7-8]") printf '%s\\n' node7 node8 ;;
          "show job -d 12345") printf '%s\\n' "JobId=12345 JobName=zero_sft" "   TRES=cpu=16,gres/gpu=4" "$FAKE_NODES" ;;
          "show job 12345") printf '%s\\n' "JobId=12345 JobName=zero_sft" "   Command=$FAKE_COMMAND" "   WorkDir=/" ;;
          *) echo "unexpected: scontrol $*" >&2; exit 1 ;;
        esac""",
    "nproc": f"echo {CPUS}",
}
SMI = """
    [[ $* == -L ]] || exit 1
    echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"
    echo "  MIG 1g.10gb     Device  0: (UUID: MIG-1)"
    for number in 1 2 3; do echo "GPU $number: NVIDIA H100 (UUID: GPU-x)"; done"""
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."; exit 9'

NODES = "   Nodes=node[7-8] CPU_IDs=0-7 Mem=0 GRES="
ALLOCATION = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_CPUS_PER_NODE": "8(x2)",
    # a batch script has these, for itself
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "FAKE_NODES": NODES + "gpu:a100:2(IDX:0-1),shard:4(IDX:0)",
}


class Machine:
    """A project with an environment of its own, and a PATH with nothing on it but stand-ins and a few plain tools."""

    def __init__(self, folder: Path) -> None:
        self.path, self.record, self.project = folder / "path", folder / "record", folder / "project"
        environment = self.project / ".venv" / "bin"
        for made in (self.path, self.record, environment, self.project / "zero_sft", folder / "elsewhere"):
            made.mkdir(parents=True)
        (self.project / "zero_sft" / "__init__.py").touch()
        self.elsewhere = folder / "elsewhere"
        self.script = Path(shutil.copy(SCRIPT, self.project))
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))
        for name, body in FAKES.items():
            self.add(name, body, environment if name in ("deepspeed", "python") else self.path)

    def add(self, name: str, body: str, folder: Path | None = None) -> None:
        file = (folder or self.path) / name
        file.write_text(RECORD.replace("/bin/bash", shutil.which("bash")) + body + "\n")
        file.chmod(0o755)

    def run(self, *arguments: str, status: int = 0, **env: str) -> str:
        """Start the script in a folder that isn't the project's, check its status and return what it printed."""
        env = {"PATH": str(self.path), "HOME": str(self.elsewhere), "RECORD": str(self.record), **env}
        command = [str(self.path / "bash"), str(self.script), *arguments]
        done = subprocess.run(
            command, env=env, cwd=self.elsewhere, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def argv(self, name: str) -> list[str]:
        return (self.record / f"{name}.argv").read_text().split("\0")[:-1]

    def env(self, name: str) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in (self.record / f"{name}.env").read_text().split("\0")[:-1])

    def started(self) -> list[str]:
        return sorted(file.stem for file in self.record.glob("*.argv"))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_script_is_clean():
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("env", [{}, ALLOCATION], ids=["here", "slurm"])
def test_help_starts_nothing(machine, option, env):
    printed = machine.run(option, **env)
    assert printed.startswith("Usage:")
    assert "ZERO_SFT_CPU_RANKS" in printed
    assert machine.started() == []


# --- One machine -----------------------------------------------------------------------------------------------------


def test_two_cpu_ranks_without_a_gpu(machine):
    printed = machine.run("--model_name_or_path", "x", "--run_name", "two words", "")
    assert "no GPU found: starting 2 CPU ranks" in printed
    assert machine.argv("deepspeed") == [
        *("--num_gpus", "2", "--master_port", FREE_PORT, "--module", "zero_sft.train"),
        *("--model_name_or_path", "x", "--run_name", "two words", ""),
    ]
    env = machine.env("deepspeed")
    assert env["OMP_NUM_THREADS"] == str(CPUS // 2)
    assert env["PYTHONPATH"] == str(machine.project)
    assert "DS_ACCELERATOR" not in env


def test_gpu_driver_that_fails_is_no_gpu(machine):
    machine.add("nvidia-smi", NO_DRIVER)
    machine.run()
    assert machine.argv("deepspeed")[:2] == ["--num_gpus", "2"]


@pytest.mark.parametrize(("ranks", "threads"), [("3", "2"), ("1", "8"), ("20", "1")])
def test_cpu_ranks_from_the_environment(machine, ranks, threads):
    machine.run(ZERO_SFT_CPU_RANKS=ranks, PYTHONPATH="/mine")
    assert machine.argv("deepspeed")[:2] == ["--num_gpus", ranks]
    assert machine.env("deepspeed")["OMP_NUM_THREADS"] == threads
    assert machine.env("deepspeed")["PYTHONPATH"] == f"{machine.project}:/mine"


@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
def test_cpu_ranks_that_are_no_number(machine, ranks):
    assert f"ZERO_SFT_CPU_RANKS={ranks} is not a number of ranks" in machine.run(ZERO_SFT_CPU_RANKS=ranks, status=2)
    assert machine.started() == []


def test_gpus_are_counted(machine):
    machine.add("nvidia-smi", SMI)
    machine.run("--max_steps", "2", ZERO_SFT_CPU_RANKS="5")
    # The launcher takes all GPUs by itself; with --num_gpus it would ignore CUDA_VISIBLE_DEVICES.
    assert machine.argv("deepspeed") == ["--master_port", FREE_PORT, "--module", "zero_sft.train", "--max_steps", "2"]
    assert machine.env("deepspeed")["OMP_NUM_THREADS"] == str(CPUS // 4)


def test_gpus_chosen_by_cuda_visible_devices(machine):
    machine.add("nvidia-smi", SMI)
    machine.run(CUDA_VISIBLE_DEVICES="3,1")
    assert "--num_gpus" not in machine.argv("deepspeed")
    assert machine.env("deepspeed")["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert machine.env("deepspeed")["OMP_NUM_THREADS"] == str(CPUS // 2)


@pytest.mark.parametrize("env", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"DS_ACCELERATOR": "cpu"}])
def test_hidden_gpus_are_not_used(machine, env):
    machine.add("nvidia-smi", SMI)
    assert "starting 2 CPU ranks" in machine.run(**env)
    assert machine.argv("deepspeed")[:2] == ["--num_gpus", "2"]
    assert machine.env("deepspeed")["DS_ACCELERATOR"] == "cpu"  # the launcher's ranks get CUDA_VISIBLE_DEVICES=0,1


def test_threads_and_module_from_the_environment(machine):
    machine.run(OMP_NUM_THREADS="7", ZERO_SFT_MODULE="my.module")
    assert machine.env("deepspeed")["OMP_NUM_THREADS"] == "7"
    assert machine.argv("deepspeed")[-2:] == ["--module", "my.module"]


def test_interpreter_from_the_environment(machine, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    machine.add("python", "echo 11111", other)
    machine.add("deepspeed", 'record other "$@"', other)
    machine.run(ZERO_SFT_PYTHON=str(other / "python"))
    assert machine.argv("other")[:4] == ["--num_gpus", "2", "--master_port", "11111"]
    assert "is not an executable" in machine.run(ZERO_SFT_PYTHON=str(other / "python4"), status=2)


@pytest.mark.parametrize(
    ("given", "launcher", "job"),
    [
        (
            ["--num_gpus", "3", "--master_port", "1234", "--model_name_or_path", "x"],
            ["--num_gpus", "3", "--master_port", "1234"],
            ["--model_name_or_path", "x"],
        ),
        (["--num_gpus=3", "--lr", "1"], ["--num_gpus=3", "--master_port", FREE_PORT], ["--lr", "1"]),
        (["--num_accelerators", "3", "x.yaml"], ["--num_accelerators", "3", "--master_port", FREE_PORT], ["x.yaml"]),
        (
            ["-i", "localhost:1,3", "--no_local_rank", "x.yaml"],
            ["-i", "localhost:1,3", "--no_local_rank", "--master_port", FREE_PORT],
            ["x.yaml"],
        ),
        (["--num_gpus", "3", "--"], ["--num_gpus", "3", "--master_port", FREE_PORT], []),
        (["--", "--num_gpus", "3"], ["--num_gpus", "2", "--master_port", FREE_PORT], ["--num_gpus", "3"]),
        (["--", "--help"], ["--num_gpus", "2", "--master_port", FREE_PORT], ["--help"]),
        (["--log_level", "info"], ["--num_gpus", "2", "--master_port", FREE_PORT], ["--log_level", "info"]),
        (["--x", "--", "--y"], ["--num_gpus", "2", "--master_port", FREE_PORT], ["--x", "--", "--y"]),
        (["", "--lr", "1"], ["--num_gpus", "2", "--master_port", FREE_PORT], ["", "--lr", "1"]),
    ],
)
def test_launcher_options_stand_before_the_jobs_arguments(machine, given, launcher, job):
    machine.run(*given)
    assert machine.argv("deepspeed") == [*launcher, "--module", "zero_sft.train", *job]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--lr", "1", "--num_gpus", "3"], "--num_gpus is an option of the launcher: put it before"),
        (["--lr", "1", "--master_port=3"], "--master_port is an option of the launcher: put it before"),
        (["--module", "x"], "--module is given by this script"),
        (["--num_gpus", "2", "-m", "x"], "-m is given by this script"),
    ],
)
def test_misplaced_launcher_options(machine, given, message):
    assert message in machine.run(*given, status=2)
    assert machine.started() == []


def test_hostfile_decides_the_ranks(machine):
    machine.run("-H", "/hosts", "--lr", "1")
    assert machine.argv("deepspeed")[:4] == ["-H", "/hosts", "--master_port", FREE_PORT]
    assert "OMP_NUM_THREADS" not in machine.env("deepspeed")


def test_knows_the_options_of_the_installed_launcher(machine):
    spec = find_spec("deepspeed")
    if spec is None or not spec.origin:
        pytest.skip("DeepSpeed is not installed")
    tree = ast.parse((Path(spec.origin).parent / "launcher" / "runner.py").read_text())
    given = []
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"):
            continue
        names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        flag = any(word.arg == "action" for word in call.keywords)
        for name in names:
            # without those that the script gives itself, refuses, or leaves to the job
            if name.startswith("-") and name not in ("--module", "--no_python", "--log_level"):
                given += [name] if flag else [name, "1"]
    assert len(given) > 20
    machine.run(*given, "--lr", "1")
    assert machine.argv("deepspeed") == [*given, "--module", "zero_sft.train", "--lr", "1"]


def test_status_of_the_launcher_is_passed_on(machine):
    machine.run(FAKE_EXIT="17", status=17)
    assert machine.started() == ["deepspeed"]


# --- SLURM -----------------------------------------------------------------------------------------------------------


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
    assert "tasks per node: 1, GPUs per node: 8; starting one rank a GPU" in printed
    srun = machine.argv("srun")
    assert [option(srun, name) for name in ("ntasks", "ntasks-per-node", "cpus-per-task")] == ["16", "8", "8"]
    assert machine.env("rank15")["LOCAL_RANK"] == "7"


def test_fewer_cpus_than_ranks(machine):
    printed = machine.run(
        status=2,
        **{
            **ALLOCATION,
            "SLURM_TASKS_PER_NODE": "1(x2)",
            "SLURM_JOB_CPUS_PER_NODE": "1(x2)",
            "FAKE_NODES": NODES + "gpu:8(IDX:0-7)",
        },
    )
    assert "1 CPUs are too few for 8 ranks on each node: submit with --ntasks-per-node=8" in printed
    assert machine.started() == []


@pytest.mark.parametrize("gres", ["", "shard:2(IDX:0)"])
def test_one_rank_a_task_without_gpus(machine, gres):
    machine.run(**{**ALLOCATION, "SLURM_TASKS_PER_NODE": "3(x2)", "FAKE_NODES": NODES + gres})
    srun = machine.argv("srun")
    assert [option(srun, name) for name in ("ntasks", "ntasks-per-node", "cpus-per-task")] == ["6", "3", "2"]
    assert option(srun, "gpus-per-node") is None


def test_nodes_that_differ(machine):
    gpus = f"{NODES}gpu:a100:2(IDX:0-1)\n{NODES}gpu:a100:4(IDX:0-3)"
    printed = machine.run(status=2, **{**ALLOCATION, "FAKE_NODES": gpus})
    assert "the nodes of the job have different numbers of GPUs (2, 4)" in printed
    printed = machine.run(status=2, **{**ALLOCATION, "FAKE_NODES": NODES, "SLURM_TASKS_PER_NODE": "3,2"})
    assert "the nodes of the job have different numbers of tasks (2, 3)" in printed
    assert machine.started() == []
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
    assert "--num_gpus is for DeepSpeed's launcher" in machine.run("--num_accelerators", "2", status=2, **ALLOCATION)
    assert machine.started() == []


def test_shell_of_salloc_on_the_first_node(machine):
    machine.run(**ALLOCATION, SLURM_STEP_ID=str(0xFFFFFFFA), SLURM_STEP_NUM_TASKS="1")
    assert "srun" in machine.started()


def test_inside_a_step(machine):
    step = {**ALLOCATION, "SLURM_STEP_ID": "0"}
    assert "not with srun" in machine.run(status=2, **step, SLURM_STEP_NUM_TASKS="4")
    assert machine.started() == []
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
