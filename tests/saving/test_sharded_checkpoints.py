"""Runs that resume from sharded checkpoints, next to the run that was not interrupted."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from testing.runner import run_ranks
from tests import small_job
from tests.errors import raises
from tests.saving.test_saved_runs import run_refused
from tests.slow import slow
from zero_sft.checkpoint.manifest import find_damage, optimizer_file, read_manifest
from zero_sft.plan.partition import full_range
from zero_sft.saving.optimizer_files import SavedOptimizer
from zero_sft.saving.resume import find_checkpoint
from zero_sft.zero.optimizer_state import ParameterState

OPTIONS = {
    "per_device_train_batch_size": 2, "packing": False, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
    "checkpoint_format": "sharded", "lr_scheduler_type": "cosine", "warmup_steps": 2,
}  # fmt: skip


DECAYING = {
    "zero_optimization": {"stage": 3},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 2, "total_num_steps": "auto"},
    },
}


def run(folder: Path, out: str, ranks: int = 2, **arguments) -> Path:
    return small_job.run(folder, out, ranks, OPTIONS | arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("sharded"), 16)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Six steps on two ranks: an epoch is four of them."""
    return run(folder, "whole")


def log(out: Path) -> list[tuple[float, ...]]:
    history = json.loads((out / "logs" / "history.json").read_text())
    return [(entry["step"], entry["loss"], entry["learning_rate"], entry["grad_norm"]) for entry in history if "loss" in entry]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("step", [2, slow(4)])
def test_the_end_is_that_of_the_uninterrupted_run(folder, whole, step):
    """In the middle of an epoch, and at its border: bit for bit."""
    again = run(folder, f"from{step}", resume_from_checkpoint=whole / f"checkpoint-{step}")
    assert log(again) == log(whole)
    assert equal(again, whole)
    assert equal(whole / "checkpoint-6", whole), "the last checkpoint is the model"


@pytest.mark.parametrize(("ranks", "per_device", "accumulation"), [(1, 2, 2), slow(4, 1, 1)])
def test_another_number_of_ranks(folder, whole, ranks, per_device, accumulation):
    """With the same samples a step, the curve is the same apart from rounding."""
    again = run(
        folder, f"on{ranks}", ranks, resume_from_checkpoint=whole / "checkpoint-2", per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    for one, other in zip(log(again), log(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert [entry[1] for entry in log(again)] == pytest.approx([entry[1] for entry in log(whole)], rel=1e-5)


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory) -> Path:
    """Twenty-two steps of 24 samples on four ranks, saved after the second; an epoch is two steps."""
    folder = small_job.make(tmp_path_factory.mktemp("elastic"), 48)
    run(folder, "on4", 4, **TWENTY, per_device_train_batch_size=1, gradient_accumulation_steps=6)
    return folder


TWENTY = {"max_steps": 22, "save_steps": 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_twenty_steps_on_other_ranks(twenty_steps, ranks):
    """The curve of four ranks, on 1, 2, 3 and 8, apart from rounding."""
    again = run(
        twenty_steps, f"on{ranks}", ranks, resume_from_checkpoint=twenty_steps / "on4" / "checkpoint-2", **TWENTY,
        per_device_train_batch_size=1, gradient_accumulation_steps=24 // ranks,
    )  # fmt: skip
    mine, theirs = ([entry[1] for entry in log(out)] for out in (again, twenty_steps / "on4"))
    assert len(mine) == 22
    assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_steps_of_twice_as_many_samples(folder):
    """The run goes on at the same sample. With a learning rate of 0, a step's loss depends on its samples alone."""
    still = {"learning_rate": 0.0, "lr_scheduler_type": "constant_with_warmup"}
    small = run(folder, "small_steps", save_steps=1, max_steps=7, **still)
    large = still | {"per_device_train_batch_size": 4, "max_steps": 5}
    expected = {entry[0]: entry[1] for entry in log(run(folder, "large_steps", **large))}
    for step, goes_on_after in ((2, 1), (3, 1), (4, 2), (7, 3)):
        out = run(folder, f"large_steps_from_{step}", resume_from_checkpoint=small / f"checkpoint-{step}", **large)
        entries = [(entry[0], entry[1]) for entry in log(out)]
        assert [entry[0] for entry in entries[:step]] == [each // 4 * 2 + each % 4 // 2 for each in range(1, step + 1)]
        assert entries[step:] == [(each, expected[each]) for each in range(goes_on_after + 1, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "changes"), [
    (3, {"bf16": True}),
    (2, {"deepspeed": "zero3_offload"}),
    (2, {"packing": True, "per_device_train_batch_size": 1, "max_steps": 4, "save_steps": 1}),
    (2, {"group_by_length": True}),
    (2, {"optim": "adafactor"}),
    (2, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    (3, {"lazy_preprocess": True, "per_device_train_batch_size": 1}),
    (2, {"data_path": "mixture"}),
    (2, {"deepspeed": json.dumps(DECAYING), "lr_scheduler_type": "linear"}),
])  # fmt: skip
def test_variants(folder, ranks, changes):
    name = "_".join(changes)
    if "data_path" in changes:
        changes = {"data_path": f"{folder / 'data.json'}:0.5,{small_job.make(folder / 'other', 12) / 'data.json'}:2"}
    whole = run(folder, f"{name}_whole", ranks, **changes)
    step = 3 if "save_steps" in changes else 2
    again = run(folder, f"{name}_again", ranks, resume_from_checkpoint=whole / f"checkpoint-{step}", **changes)
    assert log(again) == log(whole)
    assert equal(again, whole)


def test_a_changed_bit_is_found_before_the_weights_are_read(folder, whole):
    path = whole / "checkpoint-4" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    try:
        path.write_bytes(content)
        run_refused(folder, "whole", "resume.file_damaged", path.name, resume_from_checkpoint=whole / "checkpoint-4")
        path.write_bytes(content[:-1])
        with raises("resume.file_damaged", path.name):
            find_checkpoint(str(whole / "checkpoint-4"), whole, 2)
    finally:
        content[-9] ^= 1
        path.write_bytes(content)


def change_header(path: Path, change) -> None:
    """Write a safetensors file again, with a changed header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + size])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


HOSTILE = {
    "another rank's": ("resume.bad_optimizer_file", lambda header: header.replace(b'"rank":"0"', b'"rank":"1"')),
    "another dtype": ("resume.optimizer_state_missing", lambda header: header.replace(b'"F32"', b'"I32"')),
    "no slash": ("resume.bad_optimizer_file", lambda header: header.replace(b"exp_avg/model.norm", b"exp_avg_model.norm")),
    "unknown parameter": ("resume.bad_optimizer_file", lambda header: header.replace(b"exp_avg/model", b"exp_avg/other")),
    "no number": ("resume.bad_optimizer_file", lambda header: re.sub(rb"\[4(\.0)?,", rb'[\\"4\\",', header)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(whole, tmp_path, name):
    """With a manifest to match, which any author can write."""
    code, change = HOSTILE[name]
    for rank in range(2):
        shutil.copy(whole / "checkpoint-4" / optimizer_file(rank, 2), tmp_path)
    change_header(tmp_path / optimizer_file(0, 2), change)
    saved = SavedOptimizer(tmp_path, 2, described_by=1 if name == "another dtype" else 0)
    values = torch.zeros(32)
    state = ParameterState(name="model.norm.weight", flat_range=full_range(32), tensors={"exp_avg": values})
    with raises(code, optimizer_file(0, 2)):
        saved.formats()
        saved.fill(state, 32)


@pytest.mark.slow
def test_the_limit_and_a_finished_run(folder):
    out = run(folder, "limited", save_total_limit=2, save_steps=1, max_steps=4)
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]
    before = weights(out)
    run(folder, "limited", save_total_limit=2, save_steps=1, max_steps=4, resume_from_checkpoint=True)
    after = weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
def test_the_best_model_is_exported(folder, changes):
    """The best is the second step's here, since the larger loss is asked for; the run trained on to the fourth."""
    best = {
        "eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1, "max_steps": 4, **changes,
    }  # fmt: skip
    name = f"best_{len(changes)}"
    out = run(folder, name, **best)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert equal(out, out / "checkpoint-2")
    run(folder, name, resume_from_checkpoint=True, **best)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert equal(out, out / "checkpoint-2")
    assert not equal(out, out / "checkpoint-4")


@pytest.mark.slow
def test_a_run_that_was_moved(folder):
    """The best checkpoint is found next to the one that is resumed from; and this run's own steps of evaluation count."""
    best = {
        "eval_data_path": folder / "data.json", "eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 1,
        "metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1,
    }  # fmt: skip
    first = run(folder, "moved", eval_steps=1, max_steps=2, **best)
    assert sorted(path.name for path in first.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    moved = first.rename(folder / "moved elsewhere")
    run(folder, "moved elsewhere", eval_steps=2, max_steps=5, resume_from_checkpoint=True, **best | {"save_steps": 2})
    assert sorted(path.name for path in moved.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    assert equal(moved, moved / "checkpoint-1")
    history = json.loads((moved / "logs" / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 4, 5]


@pytest.mark.slow
def test_the_best_keeps_its_files(folder):
    """With twice as many samples per step, the second step of the resumed run is saved under the name of the best one."""
    best = {
        "eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 4,
    }  # fmt: skip
    out = run(folder, "best_kept", per_device_train_batch_size=1, **best)
    first = weights(out / "checkpoint-2")
    run(folder, "best_kept", resume_from_checkpoint=out / "checkpoint-2", **best)
    assert not all(torch.equal(first[name], value) for name, value in weights(out / "checkpoint-2").items())
    for place in (out / "checkpoint-2-best", out):
        assert all(torch.equal(first[name], value) for name, value in weights(place).items())


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_changed_bit_in_the_newest_one(folder, whole, wanted):
    """The one before is taken, since nobody named this one."""
    out = folder / f"bit_{wanted}"
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    path = out / "checkpoint-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    run(folder, out.name, resume_from_checkpoint=wanted)
    assert log(out) == log(whole)
    assert equal(out, whole)


@pytest.mark.slow
def test_auto(folder, whole):
    """A start where there is nothing, or nothing complete; then the newest one."""
    out = folder / "auto"
    broken = shutil.copytree(whole / "checkpoint-4", out / "checkpoint-4")
    (broken / "model.safetensors").unlink()
    (out / ".checkpoint-6.01234567.partial").mkdir()
    run(folder, "auto", resume_from_checkpoint="auto", save_steps=4)
    assert log(out) == log(whole)
    assert equal(out / "checkpoint-4", whole / "checkpoint-4")
    assert not (out / ".checkpoint-6.01234567.partial").exists()
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "logs")
    run(folder, "auto", resume_from_checkpoint="auto", save_steps=4)
    assert log(out) == log(whole)
    assert equal(out, whole)


OPERATIONS = ("pwrite", "fsync", "rename", "mkdir", "open")


def job_until(folder, out, arguments, victim, operation):
    """A job whose rank `victim` dies by SIGKILL at its `operation`-th file operation in saves; all others with it."""
    import torch.distributed as dist

    from zero_sft.saving import checkpoint_saver, checkpoint_writer

    counter = itertools.count(1)

    def counted(real, *args, **kwargs):
        is_in_save = threading.current_thread().name.startswith("checkpoint") or in_save
        if is_in_save and dist.get_rank() == victim and next(counter) == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    in_save = []

    def inside(real, *args, **kwargs):
        in_save.append(None)
        try:
            return real(*args, **kwargs)
        finally:
            in_save.pop()

    for name in ("begin_checkpoint", "agree_on_manifest", "finish_checkpoint"):
        setattr(checkpoint_saver, name, functools.partial(inside, getattr(checkpoint_writer, name)))
    for name in OPERATIONS:
        setattr(os, name, functools.partial(counted, getattr(os, name)))
    small_job.train(folder, out, **arguments)
    if dist.get_rank() == victim:
        (folder / f"{out}.operations").write_text(str(next(counter) - 1))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("save_async", [True, False])
def test_killed_inside_saves(folder, save_async):
    """A run that is killed ten times, each time at a random moment in a save, ends as the one that never was."""
    out, draw = f"killed_{save_async}", random.Random(11)
    options = OPTIONS | {
        "save_steps": 1, "max_steps": 20, "save_total_limit": 2, "save_async": save_async, "resume_from_checkpoint": "auto",
    }  # fmt: skip

    def live(out, victim, operation):
        given = {"folder": folder, "out": out, "arguments": options, "victim": victim, "operation": operation}
        run_ranks(2, job_until, given, 400)

    operations = []
    for victim in (0, 1):
        live(f"{out}_counted_{victim}", victim, 0)
        operations.append(int((folder / f"{out}_counted_{victim}.operations").read_text()) // 20)
    assert min(operations) > 20, "operations a save"
    steps, kills = [0], 0
    while kills < 10:
        victim = draw.randrange(2)
        with pytest.raises(AssertionError, match="died without a word"):
            live(out, victim, draw.randrange(1, 2 * operations[victim]))
        kills += 1
        complete = find_checkpoint("auto", folder / out, 2)
        step = 0 if complete is None else complete.global_step
        assert step >= steps[-1]
        if complete is not None:
            assert find_damage(complete.folder, read_manifest(complete.folder), verify=True) is None
        steps.append(step)
    assert len(set(steps)) > 3, "kills before and after a checkpoint"
    live(out, 0, 0)
    whole = folder / f"{out}_counted_0"
    assert log(folder / out) == log(whole)
    assert equal(folder / out, whole)
    assert sorted(path.name for path in (folder / out).glob("*checkpoint*")) == ["checkpoint-19", "checkpoint-20"]
