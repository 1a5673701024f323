"""Losses and gradients that are not finite: the step is left out, the samples are named, and the run reacts as it is told."""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from testing.runner import run_ranks
from tests import small_job
from tests.errors import error_codes
from zero_sft.cluster.world import World

OPTIONS = {
    "per_device_train_batch_size": 2, "packing": False, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
    "simulate_fault": "nan:rank=1,step=4", "train_sampling_strategy": "sequential",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("numbers"), 24)


def job(folder, out, options, code=None, values=()):
    said = io.StringIO()
    ends = contextlib.nullcontext() if code is None else pytest.raises(AssertionError)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), ends:
        small_job.train(folder, out, **OPTIONS | options)
    if os.environ["RANK"] == "0":
        assert error_codes(said.getvalue()) == ([] if code is None else [code]), said.getvalue()
        for value in values:
            assert value in said.getvalue(), said.getvalue()


def run(folder, out, options, code=None, values=()):
    run_ranks(2, job, {"folder": folder, "out": out, "options": options, "code": code, "values": values}, 300)
    return folder / out


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stop(folder, packing):
    """Step 4 has samples 13 to 16 on two ranks, two on each, if they are not packed."""
    options = {"packing": packing} | ({"max_steps": 3, "simulate_fault": "nan:rank=1,step=2"} if packing else {})
    values = () if packing else ("data.json, sample 15; ", "data.json, sample 16)")
    step = 2 if packing else 4
    common = (f"step {step}: the loss is not finite on rank 1 (", "data.json, sample ")
    out = run(folder, f"stop_{packing}", options, "training.not_finite", (*common, *values))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == (["checkpoint-2"] if not packing else [])


@pytest.mark.slow
def test_skip(folder):
    """The step leaves no trace in the weights, in the optimizer and in the losses of later steps."""
    out = run(folder, "skip", {"on_nan": "skip", "save_steps": 1}, values=("step 4: the loss is not finite on rank 1 (",))
    entries = [entry["loss"] for entry in json.loads((out / "logs" / "history.json").read_text()) if "loss" in entry]
    assert [math.isfinite(loss) for loss in entries] == [True, True, True, False, True, True]
    assert state(out / "checkpoint-4") == state(out / "checkpoint-3")
    assert state(out / "checkpoint-5") != state(out / "checkpoint-3")
    total = json.loads((out / "logs" / "history.json").read_text())[-1]["train_loss"]
    assert total == pytest.approx(sum(loss for loss in entries if math.isfinite(loss)) / 5, rel=0.01)


def state(checkpoint: Path) -> dict[str, bytes]:
    """Weights and the optimizer's tensors, without random generators."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == 3
    return {
        f"{path.name}/{name}": tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for path in files
        for name, tensor in load_file(path).items()
        if not name.startswith("random/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"deepspeed": "zero3_offload", "bf16": True}])
def test_rollback(folder, options):
    """At step 4, weights and optimizer are those after step 2 again; then the run goes on."""
    name = "rollback_" + "_".join(options)
    out = run(folder, name, {"on_nan": "rollback", **options}, values=("those of checkpoint-2 again",))
    two, four, six = (state(out / f"checkpoint-{step}") for step in (2, 4, 6))
    assert two == four
    assert six.keys() == four.keys()
    assert six != four
    exported = load_file(out / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in exported.values())


@pytest.mark.slow
def test_rollback_without_a_checkpoint(folder):
    options = {"on_nan": "rollback", "simulate_fault": "nan:rank=0,step=1"}
    run(folder, "rollback_none", options, "training.no_checkpoint_to_go_back_to", ("sample 1;",))


def losses(*values):
    """The warnings for these logged losses, on one rank."""
    from zero_sft.job.loss_checks import LossChecks

    trainer = SimpleNamespace(step_losses=[torch.tensor(1.0)], step_batches=[])
    checks = LossChecks(trainer, None, World.alone(), on_nan="stop", spike_factor=2.0, roll_back=lambda: None)  # type: ignore
    for step, value in enumerate(values, start=1):
        checks.on_log(SimpleNamespace(logging_steps=1), SimpleNamespace(global_step=step), None, {"loss": value})
    checks.on_log(SimpleNamespace(logging_steps=1), SimpleNamespace(global_step=99), None, {"eval_loss": 100.0})


def test_a_jump_of_the_loss(caplog):
    losses(*[2.0, 2.2] * 10, 4.0, math.nan, 2.0, 4.5, 2.0)
    (warning,) = caplog.messages
    assert warning.startswith("step 24: the loss is 4.500, more than 2 times the median of those before (2.")
    caplog.clear()
    losses(*[2.0] * 5, 50.0)
    assert not caplog.messages, "too few losses to compare with"
