"""Words of the message of a failed job, apart from ranks."""

import os
import threading

import psutil
import pytest

from tests.errors import error_codes
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.node_board import NodeBoard
from zero_sft.cluster.world import World
from zero_sft.errors import DataError, Scope


@pytest.fixture(autouse=True)
def _job():
    failure.begin_job(World(world_size=2))
    failure.set_activity("training")


def fail_in_activity(error: Exception) -> Exception:
    with pytest.raises(type(error)) as caught, failure.activity("reading"):
        raise error
    return caught.value


def require_said(capsys, code: str, *values: str) -> None:
    """One error is said, with that code and these values."""
    said = capsys.readouterr().err
    assert (said.count("error: "), error_codes(said)) == (1, [code]), said
    for value in values:
        assert value in said


def test_the_activity_of_an_error_is_named(capsys):
    assert failure.report_failure(fail_in_activity(ValueError("x"))) == 1
    require_said(capsys, "cluster.rank_failed", "while reading: ValueError: x")


def test_an_error_that_was_caught_leaves_no_activity(capsys):
    fail_in_activity(DataError("caught", code="data.caught"))
    failure.report_failure(ValueError("x"))
    require_said(capsys, "cluster.rank_failed", "while training: ValueError: x")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes")])
def test_too_little_host_memory_has_a_remedy(error, capsys):
    failure.report_failure(error)
    require_said(capsys, "cluster.host_memory", "--per_device_train_batch_size")


def test_a_rank_on_another_host_that_is_gone(monkeypatch, capsys):
    monkeypatch.setattr(failure, "FOLLOW_ON_SECONDS", 0.1)
    failure.report_failure(RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:1"))
    require_said(capsys, "cluster.connection_lost", "while training: [gloo/pair.cc:553] Connection closed by peer")


def test_ctrl_c_and_a_launcher_that_is_gone(capsys):
    assert failure.report_interrupt() == 130
    require_said(capsys, "cluster.interrupted", "SIGINT", "while training")
    failure.begin_job(World(world_size=2))
    assert failure.report_orphan("deepspeed, process 7")
    require_said(capsys, "cluster.launcher_ended", "deepspeed, process 7")


def test_what_is_said_once_is_not_said_again(capsys):
    failure.report_failure(DataError("first", code="data.first"))
    failure.report_failure(DataError("second", code="data.second"))
    assert failure.report_signal("SIGTERM") is False
    require_said(capsys, "data.first", "first")


def test_another_rank_than_0_leaves_the_word_to_it(capsys):
    failure.begin_job(World(rank=1, world_size=2))
    failure.report_failure(DataError("the same on all ranks", code="data.same"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("world_size", "note"), [(1, ""), (2, " (rank 0 alone)")])
def test_an_error_of_one_rank(world_size, note, capsys):
    failure.begin_job(World(world_size=world_size))
    failure.report_failure(DataError("x", code="data.x", scope=Scope.THIS_RANK))
    assert capsys.readouterr().err == f"\nerror: x{note} [data.x]\n"


@pytest.fixture
def board(tmp_path):
    """The board of a node, as another rank sees it."""
    (tmp_path / "board").write_bytes(b"\0")
    other_rank = NodeBoard(tmp_path / "board", {})
    failure.set_board(World(world_size=2), NodeBoard(tmp_path / "board", {0: psutil.Process()}))
    return other_rank


def test_a_signal_leaves_the_word_to_a_rank_that_knows_more(board, capsys):
    """Such as a rank that gives rank 0 some seconds for an error which rank 0 does not have."""
    other_rank = threading.Timer(0.3, board.claim)
    other_rank.start()
    assert failure.report_signal("SIGTERM")
    assert not other_rank.is_alive()
    assert not capsys.readouterr().err


def test_a_signal_names_a_rank_that_has_died(board, tmp_path, capsys):
    child = os.fork()
    if child == 0:
        os._exit(0)  # a zombie until it is waited for
    failure.set_board(World(world_size=2), NodeBoard(tmp_path / "board", {1: psutil.Process(child)}))
    assert failure.report_signal("SIGTERM")
    os.waitpid(child, 0)
    require_said(capsys, "cluster.rank_lost", f"rank 1 (process {child})")


def test_the_main_thread_waits_for_the_signals_report(board, capsys, monkeypatch):
    """Otherwise the process would end before the thread that watches for signals has reported."""
    monkeypatch.setattr(failure, "FOLLOW_ON_SECONDS", 0.5)
    watching = threading.Thread(target=failure.report_signal, args=("SIGTERM",))
    watching.start()
    while not failure._job.is_leaving:
        pass
    assert failure.report_failure(RuntimeError("Connection closed by peer")) == 1
    require_said(capsys, "cluster.ended_by_signal", "SIGTERM", "while training")
    watching.join(5)
