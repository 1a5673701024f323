"""Ranks that do nothing outside the training steps are found, and those that work are left alone."""

import subprocess
import sys
import time

import pytest

from zero_sft.cluster import stage_watch
from zero_sft.cluster.stage_watch import StageWatch, Usage

SECONDS = 5.0


@pytest.fixture
def watch():
    said = []
    watch = StageWatch(lambda *what: said.append(what), SECONDS, poll_seconds=0.1)
    watch.said = said
    yield watch
    watch.close()


@pytest.mark.parametrize(("nbytes", "cpu_seconds", "is_idle"), [
    (0, 0, True), (1 << 20, 4, True), (2 << 20, 0, False), (0, 6, False),
])  # fmt: skip
def test_idle_for_100_seconds(nbytes, cpu_seconds, is_idle):
    """Less than 16 KiB/s and less than 5 % of a core: that is what a progress bar takes."""
    later = Usage(nbytes=10 + nbytes, cpu_seconds=3 + cpu_seconds, time=150.0)
    assert later.is_idle_since(Usage(nbytes=10, cpu_seconds=3, time=50.0)) is is_idle


def test_a_rank_that_does_nothing(watch):
    """It is said once, with the inner of two stages."""
    with watch.during("loading"), watch.during("reading the weights"):
        time.sleep(1.6 * SECONDS)
    assert watch.said == [("reading the weights", SECONDS)]


def test_a_rank_that_writes(watch, tmp_path):
    with watch.during("writing"), (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(80):
            file.write(bytes(10000))
            time.sleep(0.1)
    assert watch.said == []


@pytest.mark.slow
def test_a_rank_whose_worker_computes(watch):
    """Data is prepared in other processes."""
    program = "import time; end = time.monotonic() + 8\nwhile time.monotonic() < end: pass"
    with watch.during("preparing"):
        subprocess.run([sys.executable, "-c", program], check=True)
    assert watch.said == []


@pytest.mark.slow
def test_nothing_is_watched_outside_stages(watch):
    with watch.during("loading"):
        pass
    time.sleep(1.2 * SECONDS)
    assert watch.said == []


def test_a_library_call_is_not_watched():
    """A caller of `load_model` decides how long it waits."""
    assert stage_watch._watch is None
    with stage_watch.during("loading"):
        pass


def test_zero_is_never():
    watch = StageWatch(lambda *_: pytest.fail("called"), 0)
    with watch.during("loading"):
        time.sleep(0.1)
