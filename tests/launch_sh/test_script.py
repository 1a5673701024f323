"""`launch.sh` as a script: it can be started, is free of complaints, and explains itself."""

import os
import shutil
import subprocess

import pytest

from tests.launch_sh.machine import ALLOCATION, SCRIPT


def test_script_is_clean():
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("env", [{}, ALLOCATION], ids=["here", "slurm"])
def test_help_starts_nothing(machine, option, env):
    printed = machine.run(option, **env)
    assert printed.startswith("Usage:")
    assert "ZERO_SFT_CPU_RANKS" in printed
    assert machine.started() == []


@pytest.mark.parametrize("words", [
        ["--token", "hf_" + "a" * 34], ["--seed", "1", "--use_auth_token=hf_" + "b" * 34], ["--token", "hf_short"],
        ["--hub_token=mine"], ["--push_to_hub_token", "mine"], ["--run_name", "hf_" + "c" * 34],
    ],
)  # fmt: skip
def test_a_token_never_reaches_the_launcher(machine, words):
    said = machine.refuse("secret_on_command_line", *words)
    assert "HF_TOKEN" in said
    assert "aaaa" not in said
    assert "bbbb" not in said
