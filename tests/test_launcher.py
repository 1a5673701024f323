"""Tests of `zero_sft.launcher`: the shim can be removed without a trace, and adds `-m` to DeepSpeed's launcher."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.errors import error_codes, raises
from zero_sft import launcher
from zero_sft.launcher import State

ORIGINAL = (
    f"#!{sys.executable}\n\nfrom deepspeed.launcher.runner import main\n\nif __name__ == '__main__':\n    main()\n"
).encode()

# The relevant part of the installed launcher's parser: options with and without values, options that share the first letters
# of `-m`, the module, and the user's remaining arguments.
RUNNER = """
import argparse, json

def main(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1)
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--log_level", default="info")
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    print(json.dumps(vars(parser.parse_args(args))))
"""


@pytest.fixture
def scripts(tmp_path):
    """A folder as an installer leaves it, with both names of the launcher and an unusual mode that must be restored."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in launcher.SCRIPT_NAMES:
        (folder / name).write_bytes(ORIGINAL)
        (folder / name).chmod(0o751)
    return folder


def files(folder):
    """Return name → (content, mode) of everything in the folder."""
    return {path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}


def run_with_fake_deepspeed(script, tmp_path, *arguments):
    """Run a launcher script against a stand-in for DeepSpeed; return the finished process."""
    package = tmp_path / "site" / "deepspeed" / "launcher"
    package.mkdir(parents=True, exist_ok=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text(RUNNER)
    return subprocess.run(
        [script, *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_disable_restores_bytes_and_modes(scripts):
    before = files(scripts)
    launcher.enable([scripts])
    assert files(scripts)["deepspeed"] != before["deepspeed"]
    assert files(scripts)["deepspeed"][1] == 0o751
    assert launcher.status([scripts]) is State.ENABLED
    launcher.disable([scripts])
    assert files(scripts) == before
    assert launcher.status([scripts]) is State.NOT_ENABLED


def test_enable_and_disable_are_idempotent(scripts):
    before = files(scripts)
    launcher.enable([scripts])
    once = files(scripts)
    launcher.enable([scripts])
    assert files(scripts) == once
    launcher.disable([scripts])
    launcher.disable([scripts])
    assert files(scripts) == before


def test_the_alias_is_optional_and_another_programs_ds_is_left_alone(scripts):
    (scripts / "ds").write_bytes(b"#!/bin/sh\necho the directory server\n")
    launcher.enable([scripts])
    assert (scripts / "ds").read_bytes() == b"#!/bin/sh\necho the directory server\n"
    assert launcher.status([scripts]) is State.ENABLED
    (scripts / "ds").unlink()
    assert launcher.status([scripts]) is State.ENABLED


def test_an_upgrade_is_noticed_and_its_script_becomes_the_original(scripts):
    launcher.enable([scripts])
    assert launcher.launch_note([scripts]) is None
    upgraded = ORIGINAL.replace(b"    main()", b"    raise SystemExit(main())")
    (scripts / "deepspeed").write_bytes(upgraded)
    assert launcher.status([scripts]) is State.REPLACED
    note = launcher.launch_note([scripts])
    assert "run enable again" in note
    assert "python -m zero_sft.launcher enable" in note
    launcher.enable([scripts])
    assert launcher.status([scripts]) is State.ENABLED
    launcher.disable([scripts])
    assert (scripts / "deepspeed").read_bytes() == upgraded


def test_a_shim_of_another_version_is_noticed(scripts):
    launcher.enable([scripts])
    shim = (scripts / "deepspeed").read_bytes()
    (scripts / "deepspeed").write_bytes(shim.replace(b"run(runner)", b"runner.main()"))
    assert launcher.status([scripts]) is State.OUTDATED
    assert "run enable again" in launcher.launch_note([scripts])
    launcher.enable([scripts])
    assert (scripts / "deepspeed").read_bytes() == shim
    assert launcher.status([scripts]) is State.ENABLED


def test_disable_after_an_upgrade_keeps_the_newer_script(scripts):
    launcher.enable([scripts])
    for name in launcher.SCRIPT_NAMES:
        (scripts / name).write_bytes(ORIGINAL + b"# newer\n")
    launcher.disable([scripts])
    assert (scripts / "deepspeed").read_bytes() == ORIGINAL + b"# newer\n"
    assert sorted(files(scripts)) == sorted(launcher.SCRIPT_NAMES)


def test_a_lost_original_is_said_and_nothing_is_guessed(scripts):
    launcher.enable([scripts])
    (scripts / ".deepspeed.zero_sft-original").unlink()
    with raises("launcher.original_gone"):
        launcher.disable([scripts])


@pytest.mark.parametrize("content", [b"\x7fELF not a script", b"#!/bin/sh\nexec something-else\n", b""])
def test_a_foreign_script_is_refused(scripts, content):
    (scripts / "deepspeed").write_bytes(content)
    before = files(scripts)
    with raises("launcher.unknown_script", str(scripts / "deepspeed"), "--module"):
        launcher.enable([scripts])
    assert files(scripts) == before


def test_a_symbolic_link_is_refused(scripts, tmp_path):
    (scripts / "deepspeed").rename(tmp_path / "elsewhere")
    (scripts / "deepspeed").symlink_to(tmp_path / "elsewhere")
    with raises("launcher.unknown_script", str(scripts / "deepspeed")):
        launcher.enable([scripts])
    assert (tmp_path / "elsewhere").read_bytes() == ORIGINAL


def test_a_folder_that_cannot_be_written_leaves_everything_as_it_was(scripts, monkeypatch):
    before = files(scripts)

    def refuse(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with raises("launcher.script_unwritable", "Permission denied", "--module zero_sft.train"):
        launcher.enable([scripts])
    assert files(scripts) == before


def test_missing_deepspeed_is_one_error_on_stderr_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda name: str(tmp_path))
    for action in ("enable", "disable", "status"):
        assert launcher.main([action]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert error_codes(captured.err) == ["launcher.no_deepspeed_command"]
        assert "pip install deepspeed" in captured.err
        assert "--module zero_sft.train" in captured.err
    assert launcher.launch_note() is None


def test_main_says_the_state(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    for action, said in (
        ("status", "not enabled"),
        ("enable", "enabled"),
        ("status", "enabled"),
        ("disable", "disabled"),
        ("disable", "disabled"),
        ("status", "not enabled"),
    ):
        assert launcher.main([action]) == 0
        assert capsys.readouterr().out == f"deepspeed -m: {said}\n"
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["on"])


def test_only_the_scripts_of_this_interpreter_are_looked_at(scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(scripts))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda name: str(tmp_path))
    with raises("launcher.no_deepspeed_command"):
        launcher.enable()
    assert (scripts / "deepspeed").read_bytes() == ORIGINAL


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num_gpus", "8", "-m", "x"], {"module": True, "user_script": "x", "user_args": [], "num_gpus": 8}),
        (["-m", "--num_gpus=8", "x"], {"module": True, "user_script": "x", "user_args": [], "num_gpus": 8}),
        (["--module", "x", "-m", "y"], {"module": True, "user_script": "x", "user_args": ["-m", "y"]}),
        (
            ["x.py", "-m", "y", "--module"],
            {"module": False, "user_script": "x.py", "user_args": ["-m", "y", "--module"]},
        ),
        (["-m", "x"], {"log_level": "info"}),
        (["-m", "zero_sft.train", "--seed", "1"], {"log_level": "error"}),
        (["--log_level", "debug", "--module", "zero_sft.train"], {"log_level": "debug"}),
        (["-i", "m", "x.py", "-m"], {"module": False, "include": "m", "user_script": "x.py", "user_args": ["-m"]}),
        (
            ["-m", "x", "-max", "3", "--master_port", "1"],
            {"module": True, "user_args": ["-max", "3", "--master_port", "1"]},
        ),
    ],
)
def test_the_shim_tells_the_launchers_m_from_the_users(scripts, tmp_path, arguments, expected):
    launcher.enable([scripts])
    done = run_with_fake_deepspeed(scripts / "deepspeed", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout)
    assert {key: parsed[key] for key in expected} == expected


def test_without_the_shim_the_launcher_refuses_m(scripts, tmp_path):
    done = run_with_fake_deepspeed(scripts / "deepspeed", tmp_path, "--num_gpus", "8", "-m", "x")
    assert done.returncode == 2
    assert "unrecognized arguments: -m" in done.stderr


def test_a_script_that_starts_through_the_shell_keeps_its_start(scripts, tmp_path):
    """Installers write this form if the interpreter's path is too long for a `#!` line."""
    start = f"#!/bin/sh\n'''exec' {sys.executable} \"$0\" \"$@\"\n' '''\n".encode()
    (scripts / "deepspeed").write_bytes(start + ORIGINAL.split(b"\n", 1)[1])
    launcher.enable([scripts])
    assert (scripts / "deepspeed").read_bytes().startswith(start)
    done = run_with_fake_deepspeed(scripts / "deepspeed", tmp_path, "-m", "x")
    assert done.returncode == 0, done.stderr


def test_real_deepspeed_runs_a_module_on_two_ranks(tmp_path):
    """Run the installed launcher through the shim: the module receives its `-m` argument. The ranks don't import DeepSpeed."""
    real = Path(sys.executable).with_name("deepspeed")
    if not real.is_file():
        pytest.skip("no deepspeed script beside this interpreter")
    scripts = tmp_path / "bin"
    scripts.mkdir()
    shutil.copy2(real, scripts)
    launcher.enable([scripts])
    (tmp_path / "tiny.py").write_text(
        "import os, sys\n"
        "with open(f\"seen.{os.environ['RANK']}\", 'w') as file:\n"
        "    file.write(repr((os.environ['WORLD_SIZE'], sys.argv[1:])))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [scripts / "deepspeed", "--num_gpus", "2", "--master_port", str(port), "-m", "tiny", "arg", "-m", "x"],
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        seen = (tmp_path / f"seen.{rank}").read_text()
        assert seen == repr(("2", [f"--local_rank={rank}", "arg", "-m", "x"]))
