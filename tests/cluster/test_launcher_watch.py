"""The thread that ends a rank with its launcher, apart from ranks."""

import signal
import subprocess
import sys
import time

import pytest

from tests.errors import error_codes
from zero_sft.cluster.launcher_watch import launcher_name

CHILD = """
import os, signal, sys, time
from zero_sft.cluster.launcher_watch import watch_launcher
watch_launcher()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.5)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.5)
print("lives", flush=True)
BODY
"""


@pytest.mark.parametrize(
    "command",
    [
        "python -u -m deepspeed.launcher.launch --world_info=x --module zero_sft.train",
        "/env/bin/python3.11 /env/bin/deepspeed --num_gpus 8 -m zero_sft.train",
        "python -X dev -m torch.distributed.run --nproc_per_node 8 x.py",
        "/env/bin/python /env/bin/torchrun x.py",
        "mpirun -n 8 python x.py",
    ],
)
def test_launchers(command):
    assert launcher_name(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash ./deepspeed",
        "python -m zero_sft.train --deepspeed zero3",
        "python train.py deepspeed",
        "python -c import deepspeed",
        "bash -c deepspeed --num_gpus 8",
        "slurmstepd: [123.0]",
        "/sbin/init",
    ],
)
def test_what_may_end_before_its_ranks(command):
    assert launcher_name(command.split()) is None


def run(body: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CHILD.replace("BODY", body)], capture_output=True, text=True, timeout=150, check=False
    )


def test_a_forked_child_ends_by_its_own_signal_and_alone():
    done = run("")
    assert done.stdout.split() == [str(-signal.SIGTERM), "lives"], done.stderr
    assert done.returncode == 0


def test_a_signal_ends_a_rank_that_is_busy_in_native_code():
    """As in a collective: the main thread waits in a C function."""
    done = run("import ctypes; os.kill(os.getpid(), signal.SIGTERM); ctypes.CDLL(None).sleep(100)")
    assert done.returncode == 128 + signal.SIGTERM
    assert error_codes(done.stderr) == ["cluster.ended_by_signal"]
    assert "error: SIGTERM " in done.stderr
    assert "while starting" in done.stderr


def test_handlers_of_others_stay(tmp_path):
    """transformers saves a checkpoint at SIGTERM where it is told to."""
    body = "signal.signal(signal.SIGTERM, lambda *_: print('saved')); os.kill(os.getpid(), signal.SIGTERM); time.sleep(2)"
    done = run(body)
    assert done.stdout.split() == [str(-signal.SIGTERM), "lives", "saved"]
    assert done.returncode == 0


def test_a_process_whose_shell_ends_goes_on(tmp_path):
    """As under nohup: only launchers are watched."""
    out = tmp_path / "out"
    code = CHILD.replace("BODY", f"time.sleep(3); open({str(out)!r}, 'w').write('lives')")
    command = ["sh", "-c", '"$0" -c "$1" >/dev/null 2>&1 &', sys.executable, code]
    subprocess.run(command, timeout=20, check=True)
    deadline = time.monotonic() + 100
    while not out.exists() or not out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert out.read_text() == "lives"
