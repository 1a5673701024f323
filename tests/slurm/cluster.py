"""A SLURM cluster on one machine: a login node and compute nodes in namespaces, with real slurmctld, slurmd and munged.

Each node has its own host name, address, process table, /dev/shm and folder `/local`; all see the same files elsewhere. The
addresses exist in the namespaces alone. Needs root, and Debian's slurm-wlm, munge, iproute2 and util-linux.
"""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")

LOGIN = "login"

_NODE = """
hostname "$0"
mount --make-rprivate /
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs -o size=4g tmpfs /dev/shm
mkdir -p /local && mount -t tmpfs -o size=200m tmpfs /local
ip link set lo up
until [[ -e $1/connected.$0 ]]; do sleep 0.05; done
shift
"$@" &
wait $!
"""
"""The first process of a node: sets the node up, waits for its network, then runs its daemon and reaps orphans."""


class Cluster:
    """A cluster. `start` and `stop` it, or use it as a context.

    Args:
        folder: for its files; a short path, since the paths of sockets are limited to 107 characters.
        nodes: the names of the compute nodes.
        cpus: of each node; more than the machine has are allowed.
        gpus: of each node: devices that SLURM hands out and that no driver knows.
    """

    def __init__(
        self, folder: Path, nodes: Sequence[str] = ("node1", "node2"), *, cpus: int = 4, gpus: int = 0, network: str = "10.87.0"
    ) -> None:
        self.folder, self.nodes, self.cpus, self.gpus, self.network = folder, list(nodes), cpus, gpus, network
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all nodes, and wait until SLURM can use them."""
        for name in ("log", "state", "devices", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_files()
        try:
            self._begin(LOGIN, ["bash", "-c", self._login_daemons()])
            self._inside(LOGIN, ["ip", "link", "add", "bridge0", "type", "bridge"], ("-n",))
            self._inside(LOGIN, ["ip", "addr", "add", f"{self.network}.1/24", "dev", "bridge0"], ("-n",))
            self._inside(LOGIN, ["ip", "link", "set", "bridge0", "up"], ("-n",))
            (self.folder / f"connected.{LOGIN}").touch()
            for node in self.nodes:
                self.start_node(node, wait=False)
            for node in self.nodes:
                self.until(lambda node=node: self.state(node) in ("idle", "mixed", "allocated"), f"{node} is not idle")
        except BaseException:
            self.stop()
            raise

    def start_node(self, node: str, *, wait: bool = True) -> None:
        """Start a node, again if it was killed."""
        address = f"{self.network}.{11 + self.nodes.index(node)}"
        (self.folder / f"connected.{node}").unlink(missing_ok=True)
        self._begin(node, ["slurmd", "-D", "-N", node])
        link = f"v{self.nodes.index(node)}"
        peer = ["peer", "name", "eth0", "netns", str(self._first_process(node))]
        self._inside(LOGIN, ["ip", "link", "add", link, "type", "veth", *peer], ("-n",))
        self._inside(LOGIN, ["ip", "link", "set", link, "master", "bridge0", "up"], ("-n",))
        self._inside(node, ["ip", "addr", "add", f"{address}/24", "dev", "eth0"], ("-n",))
        self._inside(node, ["ip", "link", "set", "eth0", "up"], ("-n",))
        (self.folder / f"connected.{node}").touch()
        if wait:
            self.until(lambda: self.state(node) == "idle", f"{node} is not idle")

    def kill_node(self, node: str) -> None:
        """Let a node crash: all its processes end at once. SLURM notices it by itself, after `SlurmdTimeout`."""
        process = self._processes.pop(node)
        process.kill()
        process.wait(10)

    def stop(self) -> None:
        """End all nodes with everything that runs on them. Their namespaces and mounts end with them."""
        for process in reversed(self._processes.values()):
            process.kill()
        for process in self._processes.values():
            process.wait(10)
        self._processes.clear()

    def run(self, *words: object, timeout_s: float = 60, cwd: Path | None = None, on: str = LOGIN, **env: str) -> str:
        """Run a command on a node, and return what it prints. Raises CalledProcessError if it fails."""
        done = subprocess.run(
            [*self._enter(on, ("-m", "-u", "-i", "-n", "-p"), cwd), *map(str, words)],
            env=self._environment(env), capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words: object, cwd: Path | None = None, **env: str) -> int:
        """Submit a job with sbatch, and return its number."""
        printed = self.run("sbatch", "--parsable", *words, cwd=cwd, **env)
        return int(printed.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """Return what SLURM knows of a job, by name: JobState, ExitCode, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: int, *states: str, seconds: float = 200) -> dict[str, str]:
        """Wait until a job is in one of the states (by default, until it has ended), and return what SLURM knows of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")
        found: dict[str, str] = {}

        def has_come() -> bool:
            found.update(self.job(number))
            return found["JobState"] in (states or ended)

        self.until(has_come, f"job {number} is not {' or '.join(states or ['at its end'])}", seconds, lambda: str(found))
        return found

    def state(self, node: str) -> str:
        """Return the state of a node: idle, mixed, allocated, down*, ..."""
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-n", node, "-o", "%T").strip()

    def processes(self) -> list[str]:
        """Return the command lines of the jobs' processes on all compute nodes."""
        found = []
        for node in self.nodes:
            if node in self._processes:
                listed = self.run("ps", "-eo", "args", on=node).splitlines()[1:]
                found += [line for line in listed if not re.match(r"bash -c|slurmd|sshd|ps |sleep 0\.05|\[", line.strip())]
        return found

    def _environment(self, env: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD", "LOCAL_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "DS_ACCELERATOR": "cpu", **env}

    def _begin(self, name: str, command: Sequence[str]) -> None:
        """Start the first process of a node in new namespaces."""
        ends_with_us = ["setpriv", "--pdeathsig", "KILL"]
        spaces = ["--mount", "--uts", "--net", "--ipc", "--pid"]
        unshare = [*ends_with_us, "unshare", *spaces, "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*unshare, "bash", "-c", _NODE, name, str(self.folder), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment({}), start_new_session=True,
            )  # fmt: skip
        self.until(lambda: self._inside(name, ["hostname"], ("-u",)) == name, f"{name} does not start")

    def _first_process(self, name: str) -> int:
        """Return the process id, on this machine, of the first process of a node."""
        pid = self._processes[name].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def _enter(self, name: str, spaces: Sequence[str], cwd: Path | None = None) -> list[str]:
        folder = [f"--wdns={cwd or Path.cwd()}"] if "-m" in spaces else []
        return ["nsenter", "-t", str(self._first_process(name)), *spaces, *folder, "--"]

    def _inside(self, name: str, command: Sequence[str], spaces: Sequence[str]) -> str:
        """Run a program of this machine in some of the namespaces of a node."""
        done = subprocess.run([*self._enter(name, spaces), *command], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    def until(
        self, condition: Callable[[], bool], problem: str, seconds: float = 30, detail: Callable[[], str] = lambda: ""
    ) -> None:
        """Wait until a condition holds; raise AssertionError with the logs if it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.SubprocessError, AssertionError, IndexError, FileNotFoundError):
                if condition():
                    return
            if time.monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace")[-300:] for path in sorted((self.folder / "log").iterdir()))
                raise AssertionError(f"{problem} after {seconds:.0f} s {detail()}\n{logs}")
            time.sleep(0.2)

    def _login_daemons(self) -> str:
        munged = f"munged -F --key-file={self.folder}/key --socket={self.folder}/socket --pid-file={self.folder}/munged.pid"
        munged += f" --log-file={self.folder}/log/munged.log --seed-file={self.folder}/seed --num-threads=2"
        return f"{munged} & until [[ -S {self.folder}/socket ]]; do sleep 0.05; done; exec slurmctld -D -c"

    def _write_files(self) -> None:
        key = self.folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self.folder.chmod(0o755)
        addresses = {node: f"{self.network}.{11 + index}" for index, node in enumerate(self.nodes)}
        hosts = [
            "127.0.0.1 localhost",
            f"{self.network}.1 {LOGIN}",
            *(f"{address} {node}" for node, address in addresses.items()),
        ]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        devices = [self.folder / "devices" / f"gpu{number}" for number in range(self.gpus)]
        for device in devices:
            subprocess.run(["mknod", device, "c", "1", "3"], check=True)  # like /dev/null
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={device}\n" for node in self.nodes for device in devices)
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "plugstack.conf").touch()
        gpus = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        node_lines = [
            f"NodeName={node} NodeAddr={address} CPUs={self.cpus} RealMemory=16000{gpus} State=UNKNOWN"
            for node, address in addresses.items()
        ]
        config = _CONFIG.format(folder=self.folder, network=self.network)
        (self.folder / "slurm.conf").write_text("\n".join([config, *node_lines, _PARTITIONS]))


_CONFIG = """\
ClusterName=small
SlurmctldHost=login({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# how long a requeued job waits at least; 120 by default
AuthInfo=socket={folder}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# more CPUs and memory than the machine has
SlurmdParameters=config_overrides
# a job that is preempted gets the signal of --signal first, and has GraceTime seconds
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MessageTimeout=30
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
ReturnToService=2
PropagateResourceLimitsExcept=ALL
MailProg=/bin/true
DefMemPerCPU=2000
GresTypes=gpu
MaxArraySize=100
"""

_PARTITIONS = """\
PartitionName=batch Nodes=ALL Default=YES MaxTime=2-00:00:00 DefaultTime=10 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=2-00:00:00 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]
