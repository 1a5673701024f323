"""The watchdog: its limits, and who is named when ranks wait for one that is stuck."""

import os
import threading
import time

import pytest

from zero_sft.cluster.watchdog import FIRST_SECONDS, StepTimes, Watchdog, describe_places, places, stacks_file, write_stacks


def test_limits():
    times = StepTimes()
    for seconds in (100, 1):
        times.add(seconds)
    assert times.limit == FIRST_SECONDS, "the first steps compile"
    times.add(1)
    assert times.limit == 120, "at least"
    for _ in range(200):
        times.add(30)
    assert times.limit == 300, "ten medians"
    times.add(5000)
    assert times.limit == 300
    fixed = StepTimes(7)
    fixed.add(100)
    assert fixed.limit == 7


def test_what_is_late_is_said_once():
    said = []
    watchdog = Watchdog(lambda *what: said.append(what), poll_seconds=0.01)
    watchdog.expect("step 1", 60)
    watchdog.expect("step 2", 0.05)
    time.sleep(0.3)
    watchdog.expect("step 3", 0.05)
    watchdog.done()
    time.sleep(0.2)
    watchdog.close()
    assert said == [("step 2", 0.05)]


def test_places(tmp_path):
    """Three ranks wait, one is elsewhere, one wrote nothing, one file is of an earlier run."""

    def wait(event):
        event.wait(10)

    event = threading.Event()
    writer = threading.Timer(0.2, lambda: [write_stacks(tmp_path, rank, "in step 3") for rank in (0, 2, 3)] and event.set())
    writer.start()
    wait(event)
    write_stacks(tmp_path, 1, "in step 3")
    write_stacks(tmp_path, 5, "in step 3")
    os.utime(stacks_file(tmp_path, 5), (1, 1))
    found = places(tmp_path, range(6), since=100)
    assert sorted(map(sorted, found.values())) == [[0, 2, 3], [1], [4, 5]]
    sentence = describe_places(found)
    assert sentence.startswith("rank 1 is in write_stacks") or sentence.startswith("rank 1 is in place_of_main_thread")
    assert "rank 0, 2, 3 are in wait (" in sentence
    assert "rank 4, 5 are in an unknown place" in sentence
    text = stacks_file(tmp_path, 2).read_text()
    assert "rank 2 on " in text
    assert "in wait" in text


@pytest.mark.parametrize("ranks", [1, 20])
def test_long_lists_are_shortened(tmp_path, ranks):
    sentence = describe_places(places(tmp_path, range(ranks), since=0))
    assert len(sentence) < 120
