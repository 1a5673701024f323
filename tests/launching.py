"""Start the real job with the real launchers in a separate session, and check that no process of it survives."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
MODULE = "zero_sft.train"

_MARK = "ZERO_SFT_TEST_STARTED"
"""Variable by which the processes of one `Started` are found; its value differs for each."""


def free_port() -> int:
    """Return a port that is probably not used by anything else."""
    return random.randint(20000, 32000)


def deepspeed(ranks: int, *words: str, module: str = MODULE, port: int | None = None) -> list[str]:
    """Return the command of DeepSpeed's launcher as it is installed, without the shim."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*runner, "--master_port", str(port or free_port()), "--module", module, *words]


def torchrun(ranks: int, *words: str, module: str = MODULE, port: int | None = None) -> list[str]:
    """Return the command of torch's launcher."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*run, "--master_port", str(port or free_port()), "-m", module, *words]


def shimmed(folder: Path) -> Path:
    """Copy the installed `deepspeed` script, enable the shim in the copy, and return its path."""
    from zero_sft import launcher

    scripts = folder / "shimmed"
    scripts.mkdir(exist_ok=True)
    real = Path(sys.executable).with_name("deepspeed")
    original = real.with_name(".deepspeed.zero_sft-original")
    text = (original if original.is_file() else real).read_text()
    script = scripts / "deepspeed"
    # The first line names another path if the environment was copied.
    script.write_text(f"#!{sys.executable}\n{text.partition(chr(10))[2]}")
    script.chmod(0o755)
    launcher.enable([scripts])
    return script


class Started:
    """A started command, whose output goes to a file and whose processes can be found while they live."""

    def __init__(self, command: Sequence[str], log: Path, **env: str) -> None:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))}
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env}
        self._log = log
        variables[_MARK] = self._mark = uuid.uuid4().hex
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables,
                start_new_session=True, preexec_fn=_signals_as_in_a_terminal,
            )  # fmt: skip
        self._seen: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ranks(self, module: str = MODULE) -> dict[int, psutil.Process]:
        """Return the living processes of the ranks, by rank."""
        found = {}
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline() and "RANK" in (env := process.environ()) and _parent_launches(process):
                    found[int(env["RANK"])] = process
        return found

    def _members(self) -> list[psutil.Process]:
        # By a variable, since `launch.sh` and torchrun start processes in new sessions, and a parent may have ended.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid or process.environ().get(_MARK) == self._mark:
                    self._seen.add(process)
        return [process for process in self._seen if _lives(process)]

    def wait_for(self, condition: Callable[[], object], seconds: float = 150) -> None:
        """Wait until the condition holds. Fail if the command ends before, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output[-3000:]
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.2)

    def wait(self, seconds: float = 200) -> int:
        """Wait for the command and return its status."""
        return self.process.wait(timeout=seconds)

    def left_after(self, seconds: float) -> list[str]:
        """Wait at most `seconds` for all processes to end, and return the command lines of those that still live."""
        deadline = time.monotonic() + seconds
        while (left := self._members()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.2)
        return [" ".join(process.cmdline()) for process in left if _lives(process)]

    def kill(self) -> None:
        """Kill all remaining processes."""
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=20)


def _signals_as_in_a_terminal() -> None:
    """Restore the default signal handlers: background jobs of a script, or under nohup, start with signals ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _parent_launches(process: psutil.Process) -> bool:
    """Return whether a process is a rank, not its worker process with the same variables: a rank's parent is a launcher."""
    parent = process.parent()
    return parent is not None and parent.pid != process.pid and "RANK" not in parent.environ()
