"""Runs of the whole job on two ranks: what their checkpoints and exports hold, and what a resumed run makes of them."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from testing.runner import run_ranks
from tests import small_job
from tests.errors import error_codes, raises
from tests.saving.test_placing import unshared
from zero_sft.saving.resume import find_checkpoint

STEPS = {
    "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
    "checkpoint_format": "deepspeed",
}  # fmt: skip


def job(folder: Path, out: str, arguments: dict[str, Any]) -> None:
    small_job.train(folder, out, **arguments)


def refused(folder: Path, out: str, arguments: dict[str, Any], code: str, value: str) -> None:
    """One rank's part of a run that must end before the weights are read, with that error on rank 0."""
    from unittest import mock

    import torch.distributed as dist

    said = io.StringIO()
    with contextlib.redirect_stderr(said), mock.patch("zero_sft.job.load_model.load_model_from") as load:
        with pytest.raises(AssertionError):
            small_job.train(folder, out, **arguments)
    assert not load.called
    if dist.get_rank() == 0:
        assert error_codes(said.getvalue()) == [code], said.getvalue()
        assert value in said.getvalue()
        assert said.getvalue().count("error:") == 1


def run(folder: Path, out: str, *, ranks: int = 2, **arguments: Any) -> Path:
    run_ranks(ranks, job, {"folder": folder, "out": out, "arguments": STEPS | arguments}, 400)
    return folder / out


def run_refused(folder: Path, out: str, code: str, value: str, *, ranks: int = 2, **arguments: Any) -> None:
    given = {"folder": folder, "out": out, "arguments": STEPS | arguments, "code": code, "value": value}
    run_ranks(ranks, refused, given, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("runs"), 24)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run of four steps that saved at the second and the fourth; its tests leave it as it is."""
    return run(folder, "whole", chat_template="vicuna")


def copied(run_folder: Path, name: str) -> Path:
    return Path(shutil.copytree(run_folder, run_folder.parent / name))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_checkpoints_hold_the_settings_of_the_export(folder, whole):
    """The trained template among them: it is not the one that the model's folder came with."""
    exported = {name: data for name, data in files(whole).items() if not name.startswith("model")}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= exported.keys()
    for step in (2, 4):
        saved = files(whole / f"checkpoint-{step}")
        assert {name: saved.get(name) for name in exported} == exported
    template = AutoTokenizer.from_pretrained(whole / "checkpoint-2").chat_template
    assert "ASSISTANT" in template
    assert template != AutoTokenizer.from_pretrained(folder / "model").chat_template


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_exports_the_same(folder, whole):
    before, out = files(whole), copied(whole, "finished")
    run(folder, out.name, chat_template="vicuna", resume_from_checkpoint=True)
    assert files(out) == before
    assert small_job.losses(folder, out.name) == small_job.losses(folder, whole.name)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_the_newest_checkpoint_is_cut(folder, whole):
    """The one before is taken, and the end is that of the uninterrupted run, bit for bit."""
    before, out = files(whole), copied(whole, "cut")
    optimizer = out / "checkpoint-4" / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    run_refused(folder, out.name, "resume.file_damaged", optimizer.name, resume_from_checkpoint=out / "checkpoint-4")
    run(folder, out.name, chat_template="vicuna", resume_from_checkpoint=True)
    assert files(out) == before


@pytest.mark.slow
def test_a_folder_with_another_run(folder, whole):
    out = copied(whole, "another")
    (out / "notes.txt").write_text("mine")
    run_refused(folder, out.name, "export.holds_another_run", "model.safetensors")
    assert files(out).keys() == files(whole).keys() | {"notes.txt"}
    run(folder, out.name, overwrite_output_dir=True, max_steps=1, save_steps=5)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (out / "notes.txt").read_text() == "mine"
    assert not equal(weights(out), weights(whole))


@pytest.mark.slow
def test_the_remedy_for_another_number_of_ranks(folder, whole):
    """The command of the message, as it stands there, exports the checkpoint; a run of any size starts from that."""
    out = copied(whole, "elsewhere")
    with raises("resume.other_world_size") as caught:
        find_checkpoint(True, out, 3)
    _, command, rest = str(caught.value).split("`")
    words = command.split()
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=300)
    model = out / "checkpoint-4-model"
    assert f"--model_name_or_path {model} " in rest
    assert files(model).keys() == files(whole).keys()
    assert equal(weights(model), weights(whole))
    again = run(folder, "three", ranks=3, model_name_or_path=model, learning_rate=0.0, max_steps=1)
    assert equal(weights(again), weights(whole))


@pytest.mark.slow
def test_weights_alone(folder, whole):
    """Each checkpoint is a plain model then, without the optimizer, and a run does not resume from it.

    The logs can't be written here, since a file has their folder's name: the run ends well all the same.
    """
    (folder / "alone").mkdir()
    (folder / "alone" / "logs").write_text("mine")
    out = run(folder, "alone", save_only_model=True, chat_template="vicuna")
    checkpoint = out / "checkpoint-4"
    assert not list(out.glob("checkpoint-*/global_step*"))
    assert equal(weights(checkpoint), weights(whole))
    assert not equal(weights(out / "checkpoint-2"), weights(whole))
    assert files(checkpoint).keys() == files(out).keys() - {"logs"} | {"trainer_state.json"}
    run_refused(folder, "alone", "resume.weights_alone", f"--model_name_or_path {checkpoint}", resume_from_checkpoint=True)


@pytest.mark.slow
def test_the_best_model_is_exported(folder, whole):
    """The best is the second step's here, since the larger loss is asked for; the run trained on to the fourth."""
    evaluation = {"eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1}
    out = run(folder, "best", chat_template="vicuna", **evaluation, **best)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not equal(weights(out), weights(whole))
    _consolidate(out / "checkpoint-2")
    assert equal(weights(out), weights(out / "checkpoint-2"))


@pytest.mark.slow
def test_the_remedy_for_a_model_with_tied_embeddings(folder, tmp_path):
    """DeepSpeed's own script refuses to write such a model's weights as safetensors."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tie_word_embeddings=True)
    model.save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "tied")
    out = run(folder, "tied_out", model_name_or_path=folder / "tied", max_steps=2)
    with raises("resume.other_world_size") as caught:
        find_checkpoint(True, out, 3)
    command = str(caught.value).split("`")[1].split()
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=300)
    assert equal(weights(out / "checkpoint-2-model"), weights(out))


@pytest.mark.slow
def test_a_run_that_is_made_longer_goes_on_with_the_rate_of_its_schedule(folder):
    """The optimizer's state has the rate of the schedule's end, 0, with which the next step would be taken."""
    common = {"lr_scheduler_type": "linear", "packing": False}
    out = run(folder, "longer", **common)
    said = run_and_say(folder, out.name, max_steps=6, resume_from_checkpoint=True, learning_rate=0.5, **common)
    rates = [entry["learning_rate"] for entry in small_job.history(folder, out.name) if "loss" in entry]
    assert rates == pytest.approx([0.001 * (1 - step / 4) for step in range(4)] + [0.001 * (1 - step / 6) for step in (4, 5)])
    assert "was to end at step 4, and this one ends at step 6" in said
    assert "--learning_rate 0.5 has no effect" in said


def run_and_say(folder: Path, out: str, **arguments: Any) -> str:
    """A run's log, as rank 0 prints it."""
    path = folder / f"{out}.log"
    run_ranks(2, logged, {"folder": folder, "out": out, "arguments": STEPS | arguments, "path": path}, 400)
    return path.read_text()


def logged(folder: Path, out: str, arguments: dict[str, Any], path: Path) -> None:
    import torch.distributed as dist

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        small_job.train(folder, out, **arguments)
    if dist.get_rank() == 0:
        path.write_text(said.getvalue())


def _consolidate(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", checkpoint, checkpoint]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)


def lost(folder: Path, out: str) -> None:
    """One rank's part of a run whose output folder becomes a file while it trains."""
    import os
    from unittest import mock

    from zero_sft.job import trainer

    os.chdir(folder)
    train = trainer.JobTrainer.train

    def train_and_lose(self, *args, **kwargs):
        train(self, *args, **kwargs)
        if self.args.process_index == 0:
            shutil.rmtree(folder / out)
            (folder / out).write_text("a file")
        torch.distributed.barrier()

    said = io.StringIO()
    with mock.patch.object(trainer.JobTrainer, "train", train_and_lose), contextlib.redirect_stderr(said):
        with pytest.raises(AssertionError):
            small_job.train(folder, out, max_steps=4, per_device_train_batch_size=2, chat_template="vicuna")
    if torch.distributed.get_rank() == 0:
        (code,) = error_codes(said.getvalue())
        assert code.startswith("export."), said.getvalue()
        assert f"{folder / 'lost-rescued-'}" in said.getvalue()


@pytest.mark.slow
def test_an_output_folder_that_is_lost_during_the_run(folder, whole):
    run_ranks(2, lost, {"folder": folder, "out": "lost"}, 400)
    (rescued,) = folder.glob("lost-rescued-*")
    assert equal(weights(rescued), weights(whole))


def failing_at_the_end(folder: Path, out: str) -> None:
    """One rank's part of a run whose last callback fails on rank 0, as a tracker that is gone would."""
    from unittest import mock

    from zero_sft.job import trainer

    def fail(self, args, *_, **__):
        if args.process_index == 0:
            raise RuntimeError("the tracker is gone")

    said = io.StringIO()
    with mock.patch.object(trainer.LogLastStep, "on_train_end", fail), contextlib.redirect_stderr(said):
        with pytest.raises(AssertionError):
            small_job.train(folder, out, max_steps=4, per_device_train_batch_size=2, chat_template="vicuna")
    if torch.distributed.get_rank() == 0:
        assert error_codes(said.getvalue()) == ["cluster.failed_after_last_step"]
        assert "RuntimeError: the tracker is gone" in said.getvalue()
        assert f"{folder / out}." in said.getvalue()


@pytest.mark.slow
def test_an_error_after_the_last_step(folder, whole):
    run_ranks(2, failing_at_the_end, {"folder": folder, "out": "late"}, 400)
    assert equal(weights(folder / "late"), weights(whole))


@pytest.mark.slow
def test_a_mount_point_as_the_output_folder(tmp_path):
    done = unshared(sys.executable, "-m", "tests.saving.mounted_job", tmp_path / "top", "50m", timeout_s=900)
    assert "trained" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_a_disk_that_is_too_small(tmp_path):
    """Two checkpoints of 0.4 MB and a model of 0.1 MB: found before the weights are read."""
    done = unshared(sys.executable, "-m", "tests.saving.mounted_job", tmp_path / "top", "600k", timeout_s=900)
    assert "\ntrained\n" not in done.stdout
    assert error_codes(done.stderr) == ["export.no_room"]
    assert "2 checkpoints of" in done.stderr
    assert "loading the model" not in done.stdout


def test_sizes_are_known_beforehand(folder, whole):
    """The export's up to some bytes of its header; a checkpoint's from below, and not far."""
    from transformers import AutoConfig

    from zero_sft.loading.request import ModelSpec
    from zero_sft.saving.checkpoint_folders import folder_bytes
    from zero_sft.saving.room import checkpoint_bytes, export_sizes

    config = AutoConfig.from_pretrained(folder / "model")
    export_bytes, numel = export_sizes(ModelSpec(folder=folder / "model", config=config, dtype=torch.float32))
    assert abs(export_bytes - (whole / "model.safetensors").stat().st_size) < 64
    states = checkpoint_bytes(numel, "adamw")
    assert states <= folder_bytes(whole / "checkpoint-2" / "global_step2") < 1.2 * states
