"""One run at a time writes to an output folder; a run that was killed leaves it free."""

import os
import signal
import subprocess
import sys

import pytest

from tests import small_job
from tests.errors import raises
from tests.saving.test_saved_runs import run_refused
from zero_sft.saving.folder_lock import lock, lock_file

HOLD = """
import sys, time
from zero_sft.saving.folder_lock import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on `tmp_path/out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_run_is_told_who_holds_it(tmp_path, holder):
    (tmp_path / "link").symlink_to("out")
    for path in (tmp_path / "out", tmp_path / "link", tmp_path / "x" / ".." / "out"):
        with raises("export.folder_in_use", str(path), f"process {holder.pid} on {os.uname().nodename}, since 20"), lock(path):
            pass
    with lock(tmp_path / "other"):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_leaves_it_free(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait(10)
    with lock(tmp_path / "out"):
        assert lock_file(tmp_path / "out").exists()
    assert not lock_file(tmp_path / "out").exists()


def test_places(tmp_path, monkeypatch):
    """Next to the folder; in it, if the folder is a mount point. A link in the lock's place is not followed."""
    out = tmp_path / "out"
    assert lock_file(out) == tmp_path / ".out.lock"
    out.mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.lock").symlink_to("victim")
    with lock(out):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert lock_file(out) == out / ".lock"
    with lock(out):
        assert (out / ".lock").exists()
    assert not list(out.iterdir())


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with lock(tmp_path / "out"):
        pass


def test_hostile_lock_files(tmp_path, holder):
    for content in (b"\x00", b"[]", b'{"pid": [1]}', b"", b'{"pid": 1, "host": "a\\u001b[2J", "since": "x"}'):
        (tmp_path / ".out.lock").write_bytes(content)
        with raises("export.folder_in_use"), lock(tmp_path / "out"):
            pass


@pytest.mark.slow
def test_the_second_job_is_refused_on_all_ranks(tmp_path, holder):
    small_job.make(tmp_path, 8)
    run_refused(tmp_path, "out", "export.folder_in_use", f"process {holder.pid} on ")
