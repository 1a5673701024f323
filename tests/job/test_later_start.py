"""A job that is started again: what is in the output folder is of this job, or of another one."""

import json

import pytest

from zero_sft.arguments import parse
from zero_sft.cluster.starts import is_later_start, job_name
from zero_sft.cluster.world import World
from zero_sft.job.later_start import resumed_if_started_again

GIVEN = [
    "--model_name_or_path",
    "m",
    "--data_path",
    "d",
    "--overwrite_output_dir",
    "True",
    "--resume_from_checkpoint",
    "/other",
]


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The output folder of the first start of SLURM's job 7, which is started for the second time."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run.json").write_text(json.dumps({"starts": [{"job": "SLURM job 6"}, {"job": "SLURM job 7"}]}))
    (tmp_path / "checkpoint-4").mkdir()
    for name in ("ZERO_SFT_START", "ZERO_SFT_RESTART_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return tmp_path


def started(output) -> tuple[object, object]:
    """How the run starts: its `--resume_from_checkpoint` and `--overwrite_output_dir`."""
    training = resumed_if_started_again(parse([*GIVEN, "--output_dir", str(output)]), World.alone()).training
    return training["resume_from_checkpoint"], training["overwrite_output_dir"]


def test_its_own_checkpoints_are_used(output):
    assert started(output) == ("auto", False)


def test_those_of_another_job_are_overwritten(output, monkeypatch):
    """The first start has ended before it had removed the earlier run."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert started(output) == ("/other", True)


def test_without_a_checkpoint_it_begins_as_it_was_told(output):
    (output / "checkpoint-4").rmdir()
    assert started(output) == ("/other", True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"starts": [5]}', '{"starts": 3}', None])
def test_a_damaged_record(output, content):
    path = output / "logs" / "run.json"
    path.unlink() if content is None else path.write_text(content)
    assert started(output) == ("/other", True)


def test_the_first_start_looks_for_nothing(output, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert started(output) == ("/other", True)


@pytest.mark.parametrize(("variables", "is_later", "name"), [
    ({}, False, ""), ({"SLURM_JOB_ID": "7"}, False, "SLURM job 7"), ({"ZERO_SFT_START": "1"}, False, ""),
    ({"ZERO_SFT_START": "2", "ZERO_SFT_RESTART_FOLDER": "/tmp/x"}, True, "/tmp/x"),
    ({"ZERO_SFT_START": "1", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7"}, True, "SLURM job 7"),
    ({"SLURM_RESTART_COUNT": "x"}, False, ""), ({"SLURM_RESTART_COUNT": "0"}, False, ""),
])  # fmt: skip
def test_what_the_variables_say(monkeypatch, variables, is_later, name):
    for each in ("ZERO_SFT_START", "ZERO_SFT_RESTART_FOLDER", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(each, raising=False)
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    assert (is_later_start(), job_name()) == (is_later, name)
