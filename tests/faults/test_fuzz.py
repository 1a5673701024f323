"""Hostile files end in an error of the package. `python -m tests.faults` tries many more."""

import os
import subprocess
import sys

import pytest

from tests.faults.fuzz import TARGETS, edited
from tests.launching import ROOT

CASES = 600


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("target", TARGETS)
def test_no_fault(target):
    """In a process of its own: a fault may end it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", str(CASES), target],
        capture_output=True, text=True, timeout=350, check=False, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{target}: {CASES} cases" in done.stdout


def test_edits_change_a_header_and_its_length():
    header = b'{"a":{"shape":[2,3]}}'
    content = len(header).to_bytes(8, "little") + header + b"data"
    changed = edited(content, [("node", 3, 4)])
    size = int.from_bytes(changed[:8], "little")
    assert changed[8 : 8 + size] == b'{"a": {"shape": [0, 3]}}'
    assert changed[8 + size :] == b"data"
    assert edited(b"abc", [("flip", 1, 1), ("cut", 2, None)]) == b"ac"
