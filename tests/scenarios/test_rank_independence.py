"""Tests that the loss is the mean over all trained tokens, so that the curve does not depend on the number of ranks."""

import pytest

from testing.runner import run_ranks
from tests import small_job

STEPS = 20
BATCH = 8


@pytest.fixture
def folder(tmp_path):
    """A job whose number of conversations is not a multiple of a step's."""
    return small_job.make(tmp_path, 60)


def train(folder, out, per_device, accumulation, batches):
    """One rank's part of a run."""
    sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    small_job.train(folder, out, **{"max_steps": STEPS, **sizes, **batches})


BATCHES = {
    "packed": {"packing": True, "model_max_length": 256},
    "at random": {"packing": False},
    "grouped": {"packing": False, "train_sampling_strategy": "group_by_length"},
}


@pytest.mark.slow
@pytest.mark.parametrize("batches", BATCHES)
def test_one_two_and_four_ranks_give_one_curve(folder, batches):
    curves = {}
    for ranks, accumulation in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        out = f"{ranks}x{accumulation}"
        run_ranks(ranks, train, {"folder": folder, "out": out, "per_device": BATCH // ranks // accumulation,
                                 "accumulation": accumulation, "batches": BATCHES[batches]}, timeout_s=200)  # fmt: skip
        curves[out] = small_job.losses(folder, out)
    reference = curves.pop("1x1")
    assert len(reference) == STEPS
    assert reference[-1] < reference[0]
    for out, curve in curves.items():
        assert curve == pytest.approx(reference, rel=1e-5), out


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "checkpoint"), [("random", 5), ("group_by_length", 10)])
def test_a_run_that_is_resumed_within_an_epoch_goes_on_alike(folder, sampling, checkpoint):
    """This includes the end of an epoch (8 steps), where repeated samples fill the batches and must not be trained on again."""
    last = checkpoint + 5
    steps = {"packing": False, "max_steps": last, "num_train_epochs": 2, "train_sampling_strategy": sampling}
    arguments = {"folder": folder, "per_device": 4, "accumulation": 1}
    run_ranks(2, train, {**arguments, "out": "whole", "batches": {**steps, "save_strategy": "steps", "save_steps": 5}}, 200)
    resumed = {**steps, "resume_from_checkpoint": folder / "whole" / f"checkpoint-{checkpoint}"}
    run_ranks(2, train, {**arguments, "out": "resumed", "batches": resumed}, 200)
    curves = [
        {entry["step"]: entry["loss"] for entry in small_job.history(folder, out) if "loss" in entry}
        for out in ("whole", "resumed")
    ]
    assert sorted(curves[1]) == list(range(1, last + 1))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
def test_the_mean_of_a_run_is_that_of_its_steps_on_all_ranks(folder):
    """This includes runs whose last steps would not be logged."""
    short = {"packing": False, "max_steps": 3}
    for out, logging in (("each", 1), ("seldom", 10)):
        run_ranks(2, train, {"folder": folder, "per_device": 4, "accumulation": 1, "out": out,
                             "batches": {**short, "logging_steps": logging}}, 200)  # fmt: skip
    histories = [small_job.history(folder, out) for out in ("each", "seldom")]
    losses = small_job.losses(folder, "each")
    means = [next(entry["train_loss"] for entry in history if "train_loss" in entry) for history in histories]
    assert means == pytest.approx([sum(losses) / 3] * 2, rel=1e-5)
    assert [entry["step"] for entry in histories[1] if "loss" in entry] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_loss_of_an_evaluation_depends_on_no_sizes(tmp_path, kind):
    """It depends neither on the ranks, nor on batches with repeated samples, nor on drop_last, nor on routers."""
    folder, found = small_job.make(tmp_path, 30, kind), {}
    for ranks, size in ((1, 1), (1, 8), (2, 4), (4, 3)):
        out = f"{ranks}x{size}"
        batches = {
            "packing": False, "max_steps": 1, "eval_data_path": folder / "data.json", "eval_strategy": "steps",
            "eval_steps": 1, "per_device_eval_batch_size": size, "dataloader_drop_last": True, "learning_rate": 0.0,
        }  # fmt: skip
        run_ranks(ranks, train, {"folder": folder, "out": out, "per_device": 4 // ranks, "accumulation": 1,
                                 "batches": batches}, timeout_s=200)  # fmt: skip
        (found[out],) = [entry["eval_loss"] for entry in small_job.history(folder, out) if "eval_loss" in entry]
    assert list(found.values()) == pytest.approx([found["1x1"]] * 4, rel=1e-5), found
