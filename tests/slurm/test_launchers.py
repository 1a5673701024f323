"""Other launchers: srun, mpirun and accelerate start `zero_sft.train` itself; DeepSpeed's launcher over pdsh and real ssh."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import MODULE, ROOT, Started
from tests.slurm.job import losses, submit, words

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(300)]

PYTHON = str(ROOT / ".venv" / "bin" / "python")


@pytest.fixture(scope="module")
def two_ranks(job, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of two ranks that torchrun has started on this machine."""
    folder = tmp_path_factory.mktemp("two")
    here(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", MODULE], job, folder)
    return losses(folder / "out")


def here(launcher: list[str], job: Path, folder: Path, program: str = sys.executable, **env: str) -> str:
    """Start the job on this machine, and return its output."""
    run = Started([program, *launcher, *words(job, folder / "out")], folder / "log", **env)
    try:
        assert run.wait(120) == 0, run.output[-3000:]
        assert run.left_after(10) == []
    finally:
        run.kill()
    return run.output


def test_srun_alone(cluster, job, two_ranks, tmp_path):
    """`srun python -m zero_sft.train`, on two nodes: the ranks derive where they meet."""
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=5", PYTHON, "-m", MODULE]
    cluster.run(*command, *words(job, tmp_path / "out"), timeout_s=120, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert losses(tmp_path / "out") == two_ranks


def test_srun_with_many_tasks_is_one_run(cluster, job, two_ranks, tmp_path):
    """Not two runs of one rank each into one folder."""
    command = ["srun", "--nodes=1", "--ntasks=2", "--time=5", PYTHON, "-m", MODULE]
    printed = cluster.run(*command, *words(job, tmp_path / "out"), timeout_s=120, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert printed.count("starting 2 ranks") == 1
    assert losses(tmp_path / "out") == two_ranks


def test_variables_of_an_allocation_confuse_nobody(cluster, job, tmp_path):
    """One process in the shell of salloc is one rank."""
    inner = shlex.join([PYTHON, "-m", MODULE, *words(job, tmp_path / "out")])
    printed = cluster.run(
        "salloc", "--nodes=1", "--ntasks=2", "--time=5", "bash", "-c", inner, timeout_s=120, PYTHONPATH=str(ROOT)
    )
    assert "starting 1 rank" in printed


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs mpirun (openmpi-bin)")
def test_mpirun(job, two_ranks, tmp_path):
    rights = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    here([*rights, "--oversubscribe", "-n", "2", sys.executable, "-m", MODULE], job, tmp_path, program="mpirun")
    assert losses(tmp_path / "out") == two_ranks


def test_accelerate(job, two_ranks, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "-m", MODULE]
    here(launch, job, tmp_path)
    assert losses(tmp_path / "out") == two_ranks


@pytest.fixture(scope="module")
def ssh(cluster, tmp_path_factory):
    """An ssh server on each node, and the arguments with which pdsh reaches them."""
    if not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()):
        pytest.skip("needs pdsh and openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    (folder / "config").write_text(
        f"Port 22\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin yes\nPidFile none\n"
    )
    for node in cluster.nodes:
        cluster.run("bash", "-c", f"mkdir -p /run/sshd && exec /usr/sbin/sshd -f {folder}/config", on=node)
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    yield shlex.join(["-i", str(folder / "user"), *options])
    for node in cluster.nodes:
        cluster.run("pkill", "-x", "sshd", on=node)


def test_a_hostfile_over_ssh(cluster, job, ssh, tmp_path):
    """Words that a shell would change arrive on both nodes as they were given."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node} slots=2\n" for node in cluster.nodes))
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    name = "two  words $HOME; *\"'{a,b}"
    options = ["--hostfile", str(hosts), "--no_ssh_check", "--master_addr", "node1"]
    cluster.run(
        ROOT / "launch.sh", *options, *words(job, tmp_path / "out", run_name=name), on="node1", cwd=tmp_path, timeout_s=180,
        ZERO_SFT_PYTHON=PYTHON, PDSH_SSH_ARGS=ssh, DS_ENV_FILE=str(tmp_path / ".deepspeed_env"),
    )  # fmt: skip
    recorded = json.loads((tmp_path / "out" / "logs" / "arguments.json").read_text())
    assert recorded["run_name"] == name
    (start,) = json.loads((tmp_path / "out" / "logs" / "run.json").read_text())["starts"]
    assert start["ranks"] == 4


def test_an_array_of_jobs(cluster, job, tmp_path):
    """A sweep over two learning rates, as docs/slurm.md shows it."""
    script = tmp_path / "sweep.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --signal=B:USR1@30 --requeue --open-mode=append\n"
        "rates=(0.001 0.01)\nrate=${rates[$SLURM_ARRAY_TASK_ID]}\n"
        f'exec {ROOT}/launch.sh "$@" --learning_rate "$rate" --output_dir {tmp_path}/rate-"$rate"\n'
    )
    arguments = [word for word in words(job, tmp_path / "unused")]
    place = arguments.index("--output_dir")
    del arguments[place : place + 2]
    place = arguments.index("--learning_rate")
    del arguments[place : place + 2]
    number = cluster.submit(
        "--array=0-1", "--ntasks=2", "--time=5", f"--output={tmp_path}/log-%a", script, *arguments, ZERO_SFT_PYTHON=PYTHON
    )
    cluster.until(lambda: not cluster.run("squeue", "-h"), "the array has not ended", 150)
    for rate in ("0.001", "0.01"):
        assert losses(tmp_path / f"rate-{rate}"), (tmp_path / "log-0").read_text() + str(number)
    assert losses(tmp_path / "rate-0.001") != losses(tmp_path / "rate-0.01")


def test_a_job_after_another(cluster, job, tmp_path):
    """A chain for clusters without requeue: the second job goes on where the first has ended for its time."""
    arguments = words(
        job, tmp_path / "out", max_steps=6, save_strategy="steps", save_steps=2, resume_from_checkpoint="auto",
        simulate_fault="preempt:rank=0,step=3,start=1",
    )  # fmt: skip
    first = submit(cluster, tmp_path / "log1", arguments, "--ntasks-per-node=2", "--no-requeue")
    arguments[arguments.index("--simulate_fault") + 1] = "slow:rank=0,step=99"
    second = submit(cluster, tmp_path / "log2", arguments, "--ntasks-per-node=2", f"--dependency=afterany:{first}")
    assert cluster.wait(second)["JobState"] == "COMPLETED", (tmp_path / "log2").read_text()
    ended = cluster.job(first)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), (tmp_path / "log1").read_text()
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_dry_run_starts_nothing(cluster, job, tmp_path):
    number = submit(cluster, tmp_path / "log", ["--dry_run", *words(job, tmp_path / "out")], "--nodes=2", "--ntasks-per-node=2")
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    text = (tmp_path / "log").read_text()
    assert "2 ranks on each of these nodes: node1 node2" in text
    assert "would start: srun --nodes=2 --ntasks=4" in text
    assert not (tmp_path / "out").exists()


def test_logs_of_each_rank(cluster, job, tmp_path):
    arguments = ["--enable_each_rank_log", str(tmp_path / "ranks"), *words(job, tmp_path / "out")]
    number = submit(cluster, tmp_path / "log", arguments, "--ntasks-per-node=2")
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == [f"job_{number}_rank_{rank}.log" for rank in (0, 1)]
    assert "step 4/4" in (tmp_path / "ranks" / f"job_{number}_rank_0.log").read_text()
