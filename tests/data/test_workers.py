"""`zero_sft.data.workers`: several processes make what one makes, and a failure in one of them is the run's."""

import json
import os
import signal

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, make_pipeline
from tests.errors import raises
from zero_sft.data import workers
from zero_sft.data.dataset import prepare_source
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.sources.local_files import LocalFiles


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Lines enough for processes, with a broken one among them."""
    monkeypatch.setattr(workers, "BATCH_OBJECTS", 20)
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x" * (n % 90)}]})
             for n in range(400)]  # fmt: skip
    lines[333] = "{broken"
    path.write_text("\n".join(lines))
    return LocalFiles(path=path)


def test_processes_make_what_one_makes(data, tmp_path):
    pipeline = make_pipeline(
        byte_tokenizer(CHATML), model_max_length=80, overlong="split", parser=SampleParser(on_bad_sample="skip")
    )
    one, two = (prepare_source(data, pipeline, tmp_path / f"{processes}", processes=processes) for processes in (1, 2))
    assert two.rows[:] == one.rows[:]
    assert two.reports == one.reports
    assert two.reports[0].bad == 1
    assert two.reports[0].dropped


def test_the_first_error_of_the_stream_is_raised(data, tmp_path):
    pipeline = make_pipeline(byte_tokenizer(CHATML), model_max_length=80)
    with raises("data.not_json", "line 334"):
        prepare_source(data, pipeline, tmp_path / "cache", processes=2)


def test_a_process_that_dies_is_an_error_with_a_remedy(data):
    pipeline = make_pipeline(byte_tokenizer(CHATML), model_max_length=80, parser=SampleParser(on_bad_sample="skip"))
    parts = workers.make_batches(pipeline, data.objects(), 2)
    next(parts)
    for child in workers.multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with raises("data.worker_died"):
        list(parts)


def test_few_objects_start_no_processes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_side_by_side", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(workers, "BATCH_OBJECTS", 500)
    pipeline = make_pipeline(byte_tokenizer(CHATML), model_max_length=80, parser=SampleParser(on_bad_sample="skip"))
    assert prepare_source(data, pipeline, tmp_path / "cache", processes=8).reports[0].samples == 400
