import shutil

import pytest

from tests.launch_sh.machine import Machine


@pytest.fixture(autouse=True)
def _bash():
    if shutil.which("bash") is None:
        pytest.skip("no bash")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)
