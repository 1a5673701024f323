"""A cluster of two nodes for the tests of this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small_job
from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def needs_slurm() -> None:
    """Skip where SLURM is not installed; fail there if CI has set ZERO_SFT_NEEDS_SLURM."""
    missing = ["root's rights"] if os.geteuid() else missing_programs()
    if missing:
        reason = f"a SLURM cluster needs {', '.join(missing)}: apt-get install slurm-wlm munge iproute2"
        assert not os.environ.get("ZERO_SFT_NEEDS_SLURM"), reason
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(needs_slurm) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder, gpus=2) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Path:
    """A folder with a small model and data."""
    return small_job.make(tmp_path_factory.mktemp("job"), 24)


@pytest.fixture(autouse=True)
def nothing_is_left(request) -> Iterator[None]:
    """After each test no job and no process of one is left on the nodes."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.run("scancel", "--quiet", "-u", "root")
        cluster.until(lambda: not cluster.run("squeue", "-h") and not cluster.processes(), "the nodes are not free", 40)
