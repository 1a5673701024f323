"""A run that fails says so once, whatever the other ranks then see, and nobody of it is left."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.errors import error_codes
from tests.launching import ROOT, Started, deepspeed, free_port, shimmed, torchrun
from tests.slow import slow
from zero_sft import launcher
from zero_sft.cluster.early_end import EXIT_STATUS

FAULTY = "tests.cluster.faulty"


def require_said(run: Started, code: str, *values: str) -> None:
    """The run has said one error, with that code and these values."""
    assert (run.output.count("error: "), error_codes(run.output)) == (1, [code]), run.output[-4000:]
    for value in values:
        assert value in run.output, run.output[-4000:]


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(command: list[str], **env: str) -> Started:
        started.append(Started(command, tmp_path / f"log{len(started)}", **env))
        return started[-1]

    yield begin
    for run in started:
        run.kill()


@pytest.fixture
def words(request, job, tmp_path, monkeypatch):
    """The words of the job: one that exchanges numbers, or one that trains, which takes longer. The parameter is indirect."""
    monkeypatch.setenv("LOGS", str(tmp_path / "out" / "logs"))
    return job() if request.param == "training" else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "how"),
    [("exchanges", "SIGTERM"), ("exchanges", "SIGKILL"), ("exchanges", "SIGHUP"), ("exchanges", "SIGTERM with the shim"),
     ("training", "SIGTERM"), ("training", "SIGTERM with the shim")],
    indirect=["words"],
)  # fmt: skip
def test_nobody_outlives_the_launcher(words, start, tmp_path, how):
    """A signal to the `deepspeed` process alone, in the middle of the job."""
    name, _, shim = how.partition(" ")
    command = deepspeed(2, *words, module=FAULTY)
    if shim:
        command = [str(shimmed(tmp_path)), "--num_gpus", "2", "-m", FAULTY, *words]
    run = start(command)
    run.wait_for(lambda: "loss" in run.output)
    assert len(run.ranks(FAULTY)) == 2
    run.process.send_signal(getattr(signal, name))
    status = run.wait(40)
    assert status != 0
    assert run.left_after(20) == []
    if shim and words:  # the ranks get the signal, and save first
        assert status == EXIT_STATUS
        assert error_codes(run.output) == ["cluster.ended_early"], run.output[-3000:]
    else:
        require_said(run, "cluster.ended_by_signal" if shim else "cluster.launcher_ended", "while training, in step ")
    assert "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize(("late", "launch"), [("0", deepspeed), ("1", deepspeed), ("0", torchrun)])
def test_an_error_from_before_the_ranks_have_joined(start, tmp_path, late, launch):
    """One rank starts later than the other: the launcher ends it before it has seen the error itself."""
    (tmp_path / "sitecustomize.py").write_text(f"import os, time\nif os.environ.get('RANK') == '{late}':\n    time.sleep(6)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = start(launch(2, "--learning_rat", "1e-5", module="zero_sft.train"), PYTHONPATH=path)
    assert run.wait(120) != 0
    require_said(run, "arguments.unknown", "--learning_rate")
    assert run.left_after(10) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_launch_sh_passes_signals_on_and_waits(start, tmp_path, name):
    """With DeepSpeed's own script, which passes nothing on."""
    script = shimmed(tmp_path)
    launcher.disable([script.parent])
    python = script.parent / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = {"ZERO_SFT_PYTHON": str(python), "ZERO_SFT_MODULE": FAULTY, "LOGS": str(tmp_path)}
    run = start([str(ROOT / "launch.sh"), "--num_gpus", "2"], **env)
    run.wait_for(lambda: "loss" in run.output)
    run.process.send_signal(getattr(signal, name))
    assert run.wait(40) != 0
    assert run.left_after(20 if name == "SIGKILL" else 2) == []
    assert len(error_codes(run.output)) == run.output.count("error: ") == 1, run.output[-3000:]


@pytest.mark.parametrize(
    ("words", "dead", "launch"),
    [slow("exchanges", 0, deepspeed), slow("exchanges", 1, deepspeed), ("exchanges", 1, torchrun),
     slow("training", 0, deepspeed), slow("training", 1, torchrun)],
    indirect=["words"],
)  # fmt: skip
def test_a_killed_rank_is_named(words, start, dead, launch):
    run = start(launch(2, *words, module=FAULTY))
    run.wait_for(lambda: "loss" in run.output)
    killed = run.ranks(FAULTY)[dead]
    killed.send_signal(signal.SIGKILL)
    assert run.wait(60) != 0
    assert run.left_after(20) == []
    where = f"error: rank {dead} (process {killed.pid}) on {socket.gethostname()} "
    require_said(run, "cluster.rank_lost", where, "while training, in step ")
    assert "0:30:00" not in run.output
    assert launch is torchrun or "Traceback" not in run.output  # torchrun has one of its own


@pytest.mark.parametrize(
    ("words", "fault", "ranks", "code", "value"),
    [
        ("exchanges", "raise", "1", "cluster.rank_failed", "while training, in step 2"),
        slow("exchanges", "raise", "0,1", "cluster.rank_failed", "RuntimeError: the fault of this test"),
        slow("exchanges", "memory", "0", "cluster.device_memory", "--per_device_train_batch_size"),
        slow("exchanges", "data", "1", "data.faulty", "(rank 1 alone)"),
        slow("training", "raise", "1", "cluster.rank_failed", "while training, in step 2"),
        slow("training", "data", "1", "data.faulty", "(rank 1 alone)"),
    ],
    indirect=["words"],
)
def test_an_error_in_a_step_is_one_message(words, start, tmp_path, fault, ranks, code, value):
    run = start(deepspeed(2, *words, module=FAULTY), FAULT=fault, FAULT_RANKS=ranks)
    assert run.wait() != 0
    assert run.left_after(20) == []
    require_said(run, code, value)
    assert run.output.count("Traceback") == (0 if fault == "data" else 1), "of the rank that failed, once"
    if fault == "raise":  # a fault in a user's code needs its traceback
        assert 'raise RuntimeError("the fault of this test")' in run.output
        assert "the fault of this test" in (tmp_path / "out" / "logs" / "error_rank_1.txt").read_text()


@pytest.mark.slow
def test_a_taken_port_is_named(start):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start(deepspeed(2, module=FAULTY, port=port))
        assert run.wait() != 0
    require_said(run, "cluster.port_taken", f" {port} of {socket.gethostname()} ", f"process {os.getpid()}", "--master_port")
    assert "Traceback" not in run.output


PROBE = """
import json, os, sys
from pathlib import Path
seen = {"argv": sys.argv[1:], "port": os.environ["MASTER_PORT"], "pid": os.getpid()}
(Path(os.environ["SEEN"]) / f"{os.environ['MASTER_PORT']}.{os.environ['RANK']}").write_text(json.dumps(seen))
"""


@pytest.fixture
def probe(tmp_path):
    """A module that writes down what reaches it, and the variables that it needs."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "seen").mkdir()
    return {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "SEEN": str(tmp_path / "seen")}


def seen(tmp_path: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "seen").iterdir())]


@pytest.mark.slow
def test_two_jobs_take_different_ports(start, tmp_path, probe):
    """The README's command twice, and one with a port that is taken."""
    command = [str(shimmed(tmp_path)), "--num_gpus", "1"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        runs = [start([*command, *words, "-m", "probe"], **probe) for words in ([], [], ["--master_port", str(port)])]
        assert [run.wait(100) for run in runs] == [0, 0, 0], [run.output[-1000:] for run in runs]
    ports = {rank["port"] for rank in seen(tmp_path)}
    assert len(ports) == 3
    assert not {"29500", str(port)} & ports
    assert "is taken, so this job takes" in runs[2].output


@pytest.mark.slow
def test_a_port_that_is_given_is_taken(start, tmp_path, probe):
    port = str(free_port())
    run = start([str(shimmed(tmp_path)), "--num_gpus", "1", "--master_port", port, "-m", "probe"], **probe)
    assert run.wait(100) == 0, run.output[-1000:]
    assert [rank["port"] for rank in seen(tmp_path)] == [port]


def test_a_killed_launcher_is_not_a_success(start, tmp_path):
    """DeepSpeed's `deepspeed` ends with status 0 if its child was killed."""
    (tmp_path / "endless.py").write_text("import os, time; print('begun', flush=True); time.sleep(40)")
    run = start([str(shimmed(tmp_path)), "--num_gpus", "1", "-m", "endless"], PYTHONPATH=str(tmp_path))
    run.wait_for(lambda: "begun" in run.output)
    child = next(each for each in run._members() if "deepspeed.launcher.launch" in each.cmdline())
    child.kill()
    assert run.wait(30) == 128 + signal.SIGKILL


SSH = """#!/bin/sh
# As ssh does: options, the host, and the words that are left, joined by blanks, for the remote user's shell.
while :; do case $1 in -o | -p | -l) shift 2 ;; -*) shift ;; *) break ;; esac; done
shift
exec sh -c "$*"
"""
PDSH = """#!{python}
# As pdsh does: one ssh for each host, with %n, %h and %% replaced. (Compared with pdsh 2.34.)
import re, subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = words[words.index("-w") + 2:]
runs = []
for number, host in enumerate(hosts):
    names = {{"n": str(number), "h": host, "%": "%"}}
    sent = [re.sub("%([nh%])", lambda match: names[match[1]], word) for word in command]
    runs.append(subprocess.Popen(["ssh", "-2", "-a", "-x", host, *sent]))
sys.exit(max(run.wait() for run in runs))
"""
WORDS = [
    "--a", "two words", '{"lr": "1e-5"}', "it's", "$HOME", "`id`", "$(id)", "*", ";", "&", "|", "#", "~", "!x", "100%", "%n%h",
    "a\\b", "", "ü", "[1, 2]", "<in", "two\nlines",
]  # fmt: skip


@pytest.mark.slow
def test_arguments_arrive_through_pdsh_as_given(start, tmp_path, probe):
    """Two hosts, with stand-ins for pdsh and ssh that read their words as the real ones do."""
    path = tmp_path / "path"
    path.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH.format(python=sys.executable))):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
    command = [
        str(shimmed(tmp_path)), "--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--no_local_rank", "-m",
        "probe", *WORDS,
    ]  # fmt: skip
    run = start(command, **{**probe, "PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path)})
    # The remote shell has the variables already: a stand-in for the export of SEEN.
    assert run.wait(100) == 0, run.output[-2000:]
    ranks = seen(tmp_path)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["argv"] == WORDS
