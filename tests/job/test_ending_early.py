"""Runs that are asked to end early: by a signal on one rank, a file, a time limit. They go on, and end as a whole run does."""

import json
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from testing.runner import run_ranks
from tests import small_job
from tests.errors import raises
from tests.slow import slow
from zero_sft.arguments.durations import parse_duration
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.cluster import early_end

OPTIONS = {
    "per_device_train_batch_size": 2, "packing": False, "max_steps": 6, "save_strategy": "steps", "save_steps": 100,
    "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("early"), 24)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    run_ranks(2, job, {"folder": folder, "out": "whole", "arguments": OPTIONS}, 300)
    return folder / "whole"


def job(folder, out, arguments, status=0, ask=None, when=(1, "step", 2)):
    """Run the job on this rank. `ask` is called on one rank, at a step or in a batch of an evaluation."""
    from zero_sft import train
    from zero_sft.job import ending_early

    rank, place, number = when
    calls = []

    def on_step_begin(self, args, state, control, **kwargs):
        if place == "step" and state.global_step + 1 == number and os.environ["RANK"] == str(rank):
            ask and ask(Path(args.output_dir))
        return step(self, args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        calls.append(state.global_step)
        if place == "evaluation" and len(calls) == number and os.environ["RANK"] == str(rank):
            ask and ask(Path(args.output_dir))
        return predict(self, args, state, control, **kwargs)

    step, predict = ending_early.EndEarly.on_step_begin, ending_early.EndEarly.on_prediction_step
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "eval_data_path": folder / "data.json", "per_device_eval_batch_size": 2, "logging_steps": 1, "learning_rate": 0.001,
        "lr_scheduler_type": "cosine", "bf16": False, "seed": 3, **arguments,
    }  # fmt: skip
    with (
        mock.patch.object(ending_early.EndEarly, "on_step_begin", on_step_begin),
        mock.patch.object(ending_early.EndEarly, "on_prediction_step", on_prediction_step),
        mock.patch.object(ending_early, "LOOK_SECONDS", 0),
    ):
        found = train.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    assert found == status, (found, early_end.recorded_signal())


def send(number):
    os.kill(os.getpid(), number)
    for _ in range(100):  # the watching thread records it
        if early_end.recorded_signal():
            return
        time.sleep(0.05)
    raise AssertionError("the signal was not recorded")


def terminate(_):
    send(signal.SIGTERM)


def announce(_):
    send(signal.SIGUSR1)


def touch(output):
    (output / "stop").touch()


def touch_folder(output):
    (output / "stop").mkdir()


def losses(out: Path) -> list[tuple[float, ...]]:
    history = json.loads((out / "logs" / "history.json").read_text())
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in history if "loss" in entry]


CASES = [
    (terminate, (1, "step", 2), 2),
    slow(announce, (0, "step", 1), 1),
    slow(touch, (0, "step", 4), 4),
    slow(terminate, (1, "step", 6), 6),
    slow(announce, (1, "evaluation", 2), 3),
]
"""The request, the rank that gets it and the place, and the step after which the run ends."""


@pytest.mark.slow
def test_a_folder_in_the_place_of_the_file(folder, tmp_path):
    """It ends the run, too, and stays; the next start asks for its removal."""
    asked = {"status": early_end.EXIT_STATUS, "ask": touch_folder, "when": (0, "step", 2)}
    run_ranks(1, job, {"folder": folder, "out": "stopped", "arguments": OPTIONS, **asked}, 300)
    assert [path.name for path in (folder / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]
    from zero_sft.job import ending_early

    with raises("arguments.stop_is_a_folder", "Remove it"):
        ending_early.remove_stop_file(folder / "stopped")


@pytest.mark.parametrize(("ask", "when", "step"), CASES)
def test_all_ranks_save_one_step_and_the_run_goes_on(folder, whole, ask, when, step):
    out = f"{ask.__name__}-{when[1]}-{when[2]}"
    asked = {"status": early_end.EXIT_STATUS, "ask": ask, "when": when}
    run_ranks(2, job, {"folder": folder, "out": out, "arguments": OPTIONS, **asked}, 300)
    (checkpoint,) = (folder / out).glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    assert find_damage(checkpoint, read_manifest(checkpoint), verify=True) is None
    assert not list((folder / out).glob("*.safetensors")), "nothing is exported"
    assert not (folder / out / "stop").exists()
    run_ranks(2, job, {"folder": folder, "out": out, "arguments": OPTIONS | {"resume_from_checkpoint": "auto"}}, 300)
    assert losses(folder / out) == losses(whole)
    mine, theirs = (load_file(each / "model.safetensors") for each in (folder / out, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_an_evaluation_before_the_first_step_of_a_resumed_run(folder):
    """Nothing was trained since the start, so the run can go on as before."""
    asked = {"status": early_end.EXIT_STATUS, "ask": terminate}
    given = {"folder": folder, "out": "before"}
    run_ranks(2, job, {**given, "arguments": OPTIONS, **asked, "when": (1, "step", 2)}, 300)
    again = OPTIONS | {"resume_from_checkpoint": "auto", "eval_on_start": True}
    run_ranks(2, job, {**given, "arguments": again, **asked, "when": (0, "evaluation", 1)}, 300)
    assert [path.name for path in (folder / "before").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_time_limit(folder):
    """Steps of half a second; three quarters of the time are left for them, and what two steps and a save take is kept."""
    arguments = OPTIONS | {"max_time": "0:30", "max_steps": 1000}
    started = time.time()
    run_ranks(2, slow_job, {"folder": folder, "out": "timed", "arguments": arguments}, 300)
    assert time.time() - started < 40
    (checkpoint,) = (folder / "timed").glob("checkpoint-*")
    assert int(checkpoint.name.removeprefix("checkpoint-")) > 5


def slow_job(folder, out, arguments):
    import psutil

    from zero_sft.job import ending_early, trainer

    real = trainer.JobTrainer.training_step
    begin = time.time()

    def training_step(*args, **kwargs):
        time.sleep(0.5)
        return real(*args, **kwargs)

    class Started:
        def create_time(self):
            return begin

    with (
        mock.patch.object(trainer.JobTrainer, "training_step", training_step),
        mock.patch.object(ending_early, "psutil", mock.Mock(Process=Started, spec=psutil)),
    ):
        job(folder, out, arguments, early_end.EXIT_STATUS)


def without_checkpoint(folder, out):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "a file")

    with mock.patch("zero_sft.saving.checkpoint_saver.write_parts", fail):
        job(folder, out, OPTIONS, 1, terminate)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_does_not_say_that_it_can_go_on(folder):
    run_ranks(2, without_checkpoint, {"folder": folder, "out": "full"}, 300)
    assert not list((folder / "full").glob("checkpoint-*"))


def test_the_same_signal_again_is_not_kept():
    """Another one is the same request: at scancel SLURM sends SIGTERM, and launch.sh passes SIGUSR1 on."""
    assert not early_end.record(signal.SIGTERM), "no run defers it"
    with early_end.deferring():
        assert not early_end.record(signal.SIGHUP), "the terminal is gone"
        assert early_end.record(signal.SIGUSR1)
        assert early_end.record(signal.SIGTERM)
        assert not early_end.record(signal.SIGUSR1)
        assert not early_end.record(signal.SIGTERM)
        assert early_end.recorded_signal() == "SIGUSR1"
    with early_end.deferring():
        assert early_end.recorded_signal() == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3:50:00", 13800), ("30", 1800), ("0:20", 20), ("90:15", 5415), ("1-12", 129600), ("2-0:30", 174600), ("1-0:0:1", 86401)],
)
def test_durations(text, seconds):
    assert parse_duration("max_time", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "-5", "3h", "1:2:3:4", "1-", "1.5", "9" * 400, "٣"])
def test_no_durations(text):
    with raises("arguments.bad_duration", "max_time"):
        parse_duration("max_time", text)
