"""A machine of stand-ins: for everything that `launch.sh` starts or asks."""

import shutil
import subprocess
from pathlib import Path

from tests.errors import error_codes

SCRIPT = Path(__file__).resolve().parents[2] / "launch.sh"
TOOLS = ("bash", "awk", "cat", "dirname", "env", "grep", "readlink", "sed", "setsid", "sort", "tr")
FREE_PORT = "45678"
CPUS = 8  # of "this machine"

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
        assert done.returncode == status, f"status {done.returncode}, not {status}: {done.stderr}"
        return done.stdout + done.stderr

    def refuse(self, code: str, *arguments: str, **env: str) -> str:
        """Start the script, which must refuse with that code, and return what it printed."""
        printed = self.run(*arguments, status=2, **env)
        assert error_codes(printed) == [f"launcher.{code}"], printed
        assert self.started() == []
        return printed

    def argv(self, name: str) -> list[str]:
        return (self.record / f"{name}.argv").read_text().split("\0")[:-1]

    def env(self, name: str) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in (self.record / f"{name}.env").read_text().split("\0")[:-1])

    def started(self) -> list[str]:
        return sorted(file.stem for file in self.record.glob("*.argv"))
