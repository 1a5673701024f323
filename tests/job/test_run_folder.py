"""The log folder of a run: it grows while the run goes on, and goes on when the run is resumed."""

import json
import time

import pytest

from tests import small_job
from zero_sft.job.run_folder import RunFolder, read_starts
from zero_sft.job.wall_time import WallTime, shares_line


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.world_size(1, timeout_s=300)
def test_a_run_and_its_continuation(tmp_path):
    small_job.make(tmp_path, 8)
    options = {
        "per_device_train_batch_size": 1,
        "packing": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_async": False,
    }
    small_job.train(tmp_path, "out", max_steps=4, **options)
    logs = tmp_path / "out" / "logs"
    first_log = (logs / "train.log").read_text()
    small_job.train(tmp_path, "out", max_steps=6, resume_from_checkpoint=True, **options)
    whole, other = json.loads((logs / "run.json").read_text())["starts"]
    assert (whole["from_step"], whole["step"], other["from_step"], other["step"]) == (0, 4, 4, 6)
    assert whole["arguments"]["max_steps"] == 4
    assert whole["data"]["digests"] == other["data"]["digests"] != []
    assert whole["versions"]["torch"]
    assert sum(whole["seconds"].values()) > 1
    steps = [line["step"] for line in lines(logs) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    events = [(line["event"], line["step"]) for line in lines(logs) if "event" in line]
    assert events == [("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("start", 4), ("checkpoint", 6)]
    log = (logs / "train.log").read_text()
    assert log.startswith(first_log), "the second start adds to it"
    assert "starting 1 rank" in log.splitlines()[0]
    assert "step 6/6" in log
    assert "were spent in steps; the rest: start" in log


@pytest.mark.slow
@pytest.mark.world_size(1, timeout_s=300)
def test_secrets_are_not_in_it(tmp_path, monkeypatch):
    from zero_sft import train

    small_job.make(tmp_path, 8)
    secret = "hf_" + "abcdefgh" * 4
    monkeypatch.setenv("HF_TOKEN", secret)
    given = {
        "model_name_or_path": str(tmp_path / "model"), "data_path": str(tmp_path / "data.json"), "max_steps": 1, "bf16": False,
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 1, "packing": False, "token": secret,
    }  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(given))
    assert train.main([str(tmp_path / "train.json")]) == 0
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_a_folder_that_can_not_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "logs").write_text("a file")
    run = RunFolder(tmp_path / "logs", is_resumed=False)
    run.begin({"a": 1}, 2, {}, 0)
    run.add({"step": 1})
    run.end(step=1)
    assert len([record for record in caplog.records if "the logs can't be written" in record.message]) == 1


def test_damaged_files_are_begun_again(tmp_path):
    for content in ("{", "[]", "[" * 200_000, '{"starts": 5}', '{"other": []}'):
        (tmp_path / "run.json").write_text(content)
        run = RunFolder(tmp_path, is_resumed=True)
        run.begin({"a": float("nan")}, 2, {}, 7)
        assert [start["from_step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [7]


def test_a_line_that_was_half_written(tmp_path):
    """The next start begins a new one."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    RunFolder(tmp_path, is_resumed=True).add({"event": "start", "step": 1})
    assert [json.loads(line).get("step") for line in lines_of(tmp_path)] == [1, 1]


def lines_of(folder):
    """Return the lines that are whole."""
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in text.splitlines() if line.endswith("}")]


def test_names_that_are_not_utf_8(tmp_path):
    run = RunFolder(tmp_path, is_resumed=False)
    run.begin({"output_dir": "/data/x\udcff"}, 2, {}, 0)
    run.add({"name": "\ud800"})
    assert read_starts(tmp_path)[0]["arguments"]["output_dir"] == "/data/x\udcff"


def test_shares():
    parts = {"steps": 80.0, "start": 15.0, "load": 5.0, "evaluation": 0.0}
    assert shares_line(parts) == "80 % of 1:40 were spent in steps; the rest: start 0:15, load 0:05"
    assert shares_line({"steps": 10.0}) == "100 % of 0:10 were spent in steps"
    assert shares_line({"steps": 0.0}) == "0 % of 0:01 were spent in steps"


def test_wall_time():
    before = {"imports": 2.0, "load": 3.0, "first step": 1.0}
    wall = WallTime(lambda: before, lambda: 0.5, lambda: 0.25)
    for _ in range(2):
        wall.on_step_begin(None, None, None)
        time.sleep(0.05)
        wall.on_step_end(None, None, None)
    wall.on_prediction_step(None, None, None)
    time.sleep(0.05)
    wall.on_prediction_step(None, None, None)
    wall.on_evaluate(None, None, None)
    wall.on_evaluate(None, None, None)
    seconds = wall.seconds(10.0)
    assert seconds["steps"] == pytest.approx(0.1, abs=0.05)
    assert seconds["evaluation"] == pytest.approx(0.05, abs=0.04)
    assert (seconds["start"], seconds["load"], seconds["saves"], seconds["data"]) == (2.0, 3.0, 0.5, 0.25)
    assert sum(seconds.values()) == pytest.approx(10.0)
