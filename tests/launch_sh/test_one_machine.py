"""`launch.sh` on one machine: what gets to DeepSpeed's launcher."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch_sh.machine import CPUS, FREE_PORT, NO_DRIVER, SMI

HOSTS = __file__  # some file that can be read


def test_two_cpu_ranks_without_a_gpu(machine):
    printed = machine.run("--model_name_or_path", "x", "--run_name", "two words", "")
    assert "2 CPU ranks" in printed
    assert machine.argv("deepspeed") == [
        *("--num_gpus", "2", "--master_port", FREE_PORT, "--module", "zero_sft.train"),
        *("--model_name_or_path", "x", "--run_name", "two words", ""),
    ]
    env = machine.env("deepspeed")
    assert env["OMP_NUM_THREADS"] == str(CPUS // 2)
    assert env["PYTHONPATH"] == str(machine.project)
    assert env["PATH"].split(":")[0] == str(machine.project / ".venv" / "bin")
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
    assert f"ZERO_SFT_CPU_RANKS={ranks} " in machine.refuse("bad_cpu_ranks", ZERO_SFT_CPU_RANKS=ranks)


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
    assert "2 CPU ranks" in machine.run(**env)
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
    missing = str(other / "python4")
    assert f"ZERO_SFT_PYTHON={missing} " in machine.refuse("no_such_python", ZERO_SFT_PYTHON=missing)
    machine.run(ZERO_SFT_PYTHON=str(other / "python"))
    assert machine.argv("other")[:4] == ["--num_gpus", "2", "--master_port", "11111"]


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
    ("given", "code", "option"),
    [
        (["--num_gpus"], "value_missing", "--num_gpus"),
        (["--lr", "1", "--num_gpus", "3"], "option_misplaced", "--num_gpus"),
        (["--lr", "1", "--master_port=3"], "option_misplaced", "--master_port"),
        (["--module", "x"], "option_of_the_script", "--module"),
        (["--num_gpus", "2", "-m", "x"], "option_of_the_script", "-m"),
        (["train.yaml", "--time=10"], "option_of_sbatch", "--time"),
        (["train.yaml", "--gpus-per-node", "8"], "option_of_sbatch", "--gpus-per-node"),
        (["--hostfile", "/nowhere", "train.yaml"], "no_hostfile", "/nowhere:"),
        (["--master_port", "99999"], "bad_port", "99999:"),
        (["--exclude", "localhost:0"], "nothing_to_exclude", "no"),
    ],
)
def test_misplaced_launcher_options(machine, given, code, option):
    assert f" {option} " in machine.refuse(code, *given)


def test_hostfile_decides_the_ranks(machine):
    machine.run("-H", HOSTS, "--lr", "1")
    assert machine.argv("deepspeed")[:4] == ["-H", HOSTS, "--master_port", FREE_PORT]
    assert "OMP_NUM_THREADS" not in machine.env("deepspeed")


@pytest.mark.parametrize("word", ["two words", '{"a": 1}', "$HOME", "a;b", "*", "it's", "", "100%n"])
def test_words_that_a_shell_on_other_machines_would_change(machine, word):
    """Unless DeepSpeed's command has the shim, which quotes them."""
    assert f"'{word}'" in machine.refuse("argument_a_shell_changes", "-H", HOSTS, "--lr", word)
    machine.run("--lr", word)
    assert machine.argv("deepspeed")[-1] == word, "on this machine no shell reads it"
    machine.add("deepspeed", '# zero_sft launcher shim\nrecord deepspeed "$@"', machine.project / ".venv" / "bin")
    machine.run("-H", HOSTS, "--lr", word)
    assert machine.argv("deepspeed")[-1] == word


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
                given += [name] if flag else [name, HOSTS if name in ("-H", "--hostfile") else "1"]
    assert len(given) > 20
    machine.run(*given, "--lr", "1")
    assert machine.argv("deepspeed") == [*given, "--module", "zero_sft.train", "--lr", "1"]


def test_status_of_the_launcher_is_passed_on(machine):
    machine.run(FAKE_EXIT="17", status=17)
    assert machine.started() == ["deepspeed"]


def test_a_dry_run_starts_nothing(machine):
    printed = machine.run("--dry_run", "--num_gpus", "3", "--run_name", "two words; *")
    assert "would start: " in printed
    assert r"--num_gpus 3 --master_port 45678 --module zero_sft.train --run_name two\ words\;\ \*" in printed
    assert machine.started() == []


def test_a_container(machine):
    machine.add("box", 'if [[ $2 == -c ]]; then echo 777; else record box "$@"; fi')
    machine.run("--seed", "1", CONTAINER="box")
    assert machine.argv("box")[:1] == ["deepspeed"]
    assert machine.argv("box")[-4:] == ["--module", "zero_sft.train", "--seed", "1"]
    assert machine.started() == ["box"]


@pytest.mark.parametrize("env", [
    {"CONTAINER": " "}, {"SLURM_STEP_NUM_TASKS": "x"}, {"SLURM_RESTART_COUNT": "x"}, {"SLURM_STEP_ID": "x"},
])  # fmt: skip
def test_odd_variables_change_nothing(machine, env):
    machine.run(**env)
    assert machine.started() == ["deepspeed"]


def test_restarts_in_any_notation(machine):
    """08 is no octal number."""
    machine.add("mktemp", 'echo "$RECORD"')
    machine.add("rm", "exit 0")
    machine.run("--max_restarts", "08")
    assert machine.started() == ["deepspeed"]


def test_no_temporary_folder(machine):
    machine.add("mktemp", "exit 1")
    assert "TMPDIR" in machine.refuse("no_temporary_folder", "--max_restarts", "1")


def test_more_ranks_than_any_machine_has(machine):
    machine.refuse("bad_cpu_ranks", ZERO_SFT_CPU_RANKS="9" * 20)
