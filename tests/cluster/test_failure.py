"""Words of the message of a failed job, apart from ranks."""

import pytest

from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.world import World
from zero_sft.errors import DataError


@pytest.fixture(autouse=True)
def _job():
    failure.begin_job(World(world_size=2))
    failure.set_stage("training")


def fail_in_stage(error: Exception) -> Exception:
    with pytest.raises(type(error)) as caught, failure.stage("reading"):
        raise error
    return caught.value


def test_the_stage_of_an_error_is_named(capsys):
    assert failure.report_failure(fail_in_stage(ValueError("x"))) == 1
    assert "failed while reading: ValueError: x" in capsys.readouterr().err


def test_an_error_that_was_caught_leaves_no_stage(capsys):
    fail_in_stage(DataError("caught"))
    failure.report_failure(ValueError("x"))
    assert "failed while training: ValueError: x" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes")])
def test_too_little_host_memory_has_a_remedy(error, capsys):
    failure.report_failure(error)
    assert "The host has too little memory." in capsys.readouterr().err


def test_a_rank_on_another_host_that_is_gone(monkeypatch, capsys):
    monkeypatch.setattr(failure, "FOLLOW_ON_SECONDS", 0.1)
    failure.report_failure(RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:1"))
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "lost the connection to another rank while training: [gloo/pair.cc:553] Connection closed by peer" in said


def test_what_is_said_once_is_not_said_again(capsys):
    failure.report_failure(DataError("first"))
    failure.report_failure(DataError("second"))
    assert failure.report_signal("SIGTERM") is False
    said = capsys.readouterr().err
    assert "first" in said
    assert "second" not in said
    assert "SIGTERM" not in said


def test_another_rank_than_0_leaves_the_word_to_it(capsys):
    failure.begin_job(World(rank=1, world_size=2))
    failure.report_failure(DataError("the same on all ranks"))
    assert not capsys.readouterr().err
