"""Blocks handed from the first process of a node to the others."""

import multiprocessing
import os
import threading

import pytest

from tests.data.test_stream import blocks_of_pass, files, spec_of, stream, until_pass  # noqa: F401 - a fixture
from tests.errors import raises
from zero_sft.data import temporary_folders
from zero_sft.data.report import DataReport
from zero_sft.data.spool import Spool, shared
from zero_sft.data.stream import StreamState
from zero_sft.errors import DataError


@pytest.fixture
def spool(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spool = Spool.create()
    yield spool
    spool.close()
    assert not spool.folder.exists()


def test_readers_get_the_blocks_of_the_writer(files, spool):  # noqa: F811
    spec = spec_of(files, "a.jsonl", pack=True)
    expected = blocks_of_pass(spec)
    written = until_pass(shared(iter(stream(spec)), spool, 0), 2)
    thread = threading.Thread(target=lambda: list(written))
    read = list(until_pass(spool.read(StreamState()), 1)) if thread.start() is None else []
    thread.join()
    assert [(block.rows, block.start) for block in read] == [(block.rows, block.start) for block in expected]
    assert [block.samples for block in read] == [block.samples for block in expected]
    assert [isinstance(each, DataReport) for each in read[-1].reports] == [True]
    assert read[-1].reports[0].lines() == expected[-1].reports[0].lines()
    for block in read:
        spool.remove(block)
    assert [block.rows for block in read] == [block.rows for block in expected]  # they are still mapped
    assert next(spool.read(read[-1].start.__class__(row=read[-1].stop))).start.pass_number == 1


def test_readers_get_the_error_of_the_writer(spool):
    def failing():
        raise DataError("line 7 is bad", code="data.not_json")
        yield

    with raises("data.not_json"):
        list(shared(failing(), spool, 5))
    with raises("data.not_json", "line 7 is bad"):
        next(spool.read(StreamState(row=5)))


def test_readers_do_not_wait_for_a_writer_that_has_ended(spool):
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    (spool.folder / "writer").write_text(str(process.pid))
    assert not spool.is_visible()
    with raises("data.stream_writer_ended"):
        next(spool.read(StreamState()))


def test_folders_of_killed_writers_are_removed(spool, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 999_999_999)
    killed = tmp_path / f"{temporary_folders.prefix('zero_sft-stream-')}x"
    monkeypatch.undo()
    killed.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Spool.create().close()
    assert not killed.exists()
    assert spool.folder.exists()
