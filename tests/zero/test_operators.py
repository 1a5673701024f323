"""DeepSpeed's operators in this project's folder: compiled once, under a lock that a killed build does not leave behind.

The operator here is a module in plain C, built by DeepSpeed's own builder, torch and ninja.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zero_sft.zero import operators
from zero_sft.zero.operators import operators_folder, prefer_environment_ninja

SOURCE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&definition); }
"""
COMPILER = """#!/bin/sh
case "$*" in *" -c "*) echo $$ >>"$COMPILED"; [ ! -e "$SLOW" ] || sleep 100;; esac
exec c++ "$@"
"""
USER = """
import sys
from deepspeed.ops.op_builder.builder import OpBuilder
from zero_sft.zero.operators import install_operator_builder

class TinyBuilder(OpBuilder):
    def __init__(self): super().__init__(name="tiny")
    def absolute_name(self): return "tiny"
    def sources(self): return [sys.argv[1]]

install_operator_builder()
install_operator_builder()
print(TinyBuilder().load(verbose=False).__file__)
"""


class Workshop:
    """A folder with the operator, a compiler that counts its calls and can be slow, and programs that use the operator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.slow = folder, folder / "cache", folder / "slow"
        (folder / "tiny.cpp").write_text(SOURCE)
        (folder / "c++").write_text(COMPILER)
        (folder / "c++").chmod(0o755)
        (folder / "compiled").touch()
        self.env = {
            **os.environ, "TORCH_EXTENSIONS_DIR": str(self.root), "CXX": str(folder / "c++"), "SLOW": str(self.slow),
            "COMPILED": str(folder / "compiled"), "DS_ACCELERATOR": "cpu",
        }  # fmt: skip

    def start(self) -> subprocess.Popen:
        """A program that loads the operator, in its own process group."""
        command = [sys.executable, "-c", USER, str(self.folder / "tiny.cpp")]
        return subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def compilations(self) -> int:
        return len((self.folder / "compiled").read_text().split())


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def finish(process: subprocess.Popen) -> Path:
    """The operator's file, as the program has found it."""
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return Path(output.split()[-1])


@pytest.mark.slow
def test_one_process_compiles_and_the_others_import(workshop):
    files = {finish(process) for process in [workshop.start() for _ in range(2)]}
    files.add(finish(workshop.start()))
    assert len(files) == 1
    assert files.pop().is_file()
    assert workshop.compilations() == 1


@pytest.mark.slow
def test_a_killed_build_costs_another_build(workshop):
    """kill -9 of the process that compiles: not of its compiler, which goes on, as after an out-of-memory kill."""
    workshop.slow.touch()
    process = workshop.start()
    deadline = time.monotonic() + 150
    while not workshop.compilations():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (lock,) = workshop.root.glob("*/building-tiny-*/tiny/lock")  # torch's
    process.kill()
    process.communicate(timeout=30)
    workshop.slow.unlink()
    assert lock.exists()
    assert finish(workshop.start()).is_file()
    assert not list(workshop.root.glob("*/building-*"))
    for compiler in (workshop.folder / "compiled").read_text().split()[:1]:
        os.kill(int(compiler), signal.SIGKILL)  # our slow one


def test_locks_of_torch_are_not_waited_for(workshop):
    """Of killed builds, by whatever program, of this operator and of others."""
    for name in ("tiny", "async_io", "py311_cpu/tiny", "py311_cpu/cpu_adam"):
        (workshop.root / name).mkdir(parents=True)
        (workshop.root / name / "lock").touch()
        os.utime(workshop.root / name / "lock", (time.time() - 10_000,) * 2)
    assert finish(workshop.start()).is_file()


@pytest.mark.slow
def test_a_changed_source_is_compiled_again(workshop):
    first = finish(workshop.start())
    (workshop.folder / "tiny.cpp").write_text(SOURCE + "\n")
    assert finish(workshop.start()) != first
    assert workshop.compilations() == 2


def test_the_folder_is_the_users_cache_unless_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert operators_folder().parent == tmp_path / "cache" / "zero_sft" / "operators"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "given"))
    assert operators_folder().parent == tmp_path / "given"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert operators_folder().parent == tmp_path / f"zero_sft-{os.getuid()}"


def test_a_temporary_folder_of_others_is_not_used(tmp_path, monkeypatch):
    """Operators are imported as code."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"zero_sft-{os.getuid()}"
    usual.mkdir()
    usual.chmod(0o777)
    folder = operators_folder()
    assert not folder.is_relative_to(usual)
    usual.chmod(0o700)
    assert operators_folder().is_relative_to(usual)


def test_hosts_that_share_a_network_file_system_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr("platform.node", lambda host=host: host)
        for file_system in ("ext4", "nfs4"):
            operators._environment.cache_clear()
            monkeypatch.setattr(operators, "_file_system", lambda path, name=file_system: name)
            names.add(operators_folder().name)
    operators._environment.cache_clear()
    assert len(names) == 3


def test_this_environments_ninja_comes_first(tmp_path, monkeypatch):
    """Once: a second call changes nothing."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    prefer_environment_ninja()
    assert os.environ["PATH"] == "/usr/bin", "it has none"
    (tmp_path / "ninja").touch()
    for _ in range(2):
        prefer_environment_ninja()
        assert os.environ["PATH"] == f"{tmp_path}:/usr/bin"
