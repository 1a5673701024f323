"""Restarts by launch.sh: after which ends the ranks are started again."""

import pytest

from zero_sft.cluster import restarts
from zero_sft.cluster.restarts import Progress, ProgressFile, decide, main, note_error, step_of_last_end

LOST = "cluster.rank_lost"


@pytest.mark.parametrize(
    ("starts", "again", "said"),
    [
        ([Progress(step=7, checkpoint=6, code=LOST)], True, "in step 7: restart 1 of 3, from checkpoint-6"),
        ([Progress(step=7)], True, "restart 1 of 3, from its newest checkpoint, if it has one"),
        ([Progress()], True, "before its first step"),
        ([Progress(step=7, code="data.unknown_role")], False, "data.unknown_role would not change"),
        ([Progress(step=7, code="training.not_finite")], False, "training.not_finite"),
        ([Progress(step=7, code="cluster.ended_by_signal")], False, "cluster.ended_by_signal"),
        ([Progress(step=7, checkpoint=6), Progress(step=9, checkpoint=8)], True, "restart 2 of 3, from checkpoint-8"),
        ([Progress(step=7, checkpoint=6), Progress(step=7, checkpoint=6)], False, "ended twice in step 7"),
        ([Progress(step=7), Progress(step=7, samples=["a, sample 3"])], False, "samples of this step: a, sample 3."),
        ([Progress(), Progress()], False, "ended twice before its first step"),
        ([Progress(step=step, checkpoint=6) for step in (7, 8, 9)], False, "3 starts have ended without a new checkpoint"),
        ([Progress(step=step, checkpoint=step - 1) for step in (7, 8, 9)], True, "restart 3 of 3"),
        ([Progress(step=step, checkpoint=step - 1) for step in (7, 8, 9, 10)], False, "3 restarts are used up"),
    ],
)
def test_decisions(starts, again, said):
    decision = decide(starts, 3)
    assert decision.again is again
    assert said in decision.reason


def test_the_record_of_a_start(tmp_path, monkeypatch, capsys):
    """Written by the ranks of two starts, and read by launch.sh."""
    monkeypatch.setenv(restarts.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("ZERO_SFT_START", "1")
    assert step_of_last_end() is None
    file = ProgressFile()
    file.update(step=4, checkpoint=None)
    file.update(step=5, checkpoint=4)
    assert main([str(tmp_path), "1", "1", "2"]) == 0
    assert "restart 1 of 2, from checkpoint-4" in capsys.readouterr().err
    monkeypatch.setenv("ZERO_SFT_START", "2")
    assert step_of_last_end() == 5
    note_error(LOST)
    assert main([str(tmp_path), "2", "1", "2"]) == 0, "ended before its first step, with the checkpoint of the start before"
    assert "restart 2 of 2, from checkpoint-4" in capsys.readouterr().err
    ProgressFile().update(step=5, checkpoint=4, samples=["a"])
    assert main([str(tmp_path), "2", "1", "2"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "launch.sh: the run has ended twice in step 5" in said.err


@pytest.mark.parametrize("content", ["", "[]", "{", '{"step": 1, "unknown": 2}', "\x00"])
def test_a_damaged_record_says_nothing(tmp_path, content):
    (tmp_path / "start-1.json").write_text(content)
    assert restarts.read_progress(tmp_path, 1) == Progress()
    assert main([str(tmp_path), "1", "1", "1"]) == 0


def test_without_launch_sh_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(restarts.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    ProgressFile().update(step=1)
    note_error(LOST)
    assert step_of_last_end() is None
    assert not list(tmp_path.iterdir())
