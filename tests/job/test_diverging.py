"""A run that diverges shows it; and the schedules that look into the optimizer work under DeepSpeed."""

import contextlib
import io
import math

import pytest

from tests import small_job
from tests.errors import error_codes


@pytest.mark.world_size(1, timeout_s=200)
@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_logged_as_it_is(tmp_path):
    small_job.make(tmp_path, 4)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        small_job.train(
            tmp_path, "out", max_steps=4, per_device_train_batch_size=1, packing=False, learning_rate=1e25, on_nan="skip"
        )
    losses = small_job.losses(tmp_path, "out")
    assert math.isfinite(losses[0])
    assert math.isnan(losses[-1]), "transformers would log 0 for it"
    bad = sum(not math.isfinite(loss) for loss in losses)
    assert said.getvalue().count("The optimizer has left the step out") == bad
    assert f"the loss was not finite in {bad} of the logged steps, first at step {5 - bad}" in said.getvalue()


@pytest.mark.world_size(1, timeout_s=200)
@pytest.mark.slow
def test_a_run_that_has_diverged_ends(tmp_path):
    small_job.make(tmp_path, 4)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(AssertionError):
        small_job.train(
            tmp_path, "out", max_steps=40, per_device_train_batch_size=1, packing=False, learning_rate=1e25, on_nan="skip"
        )
    assert error_codes(said.getvalue()) == ["training.diverged"]
    assert "step 1" in said.getvalue()


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=200)
def test_schedules_that_read_the_optimizers_defaults(tmp_path):
    """Three of transformers' schedules, against their formulas."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        small_job.make(tmp_path, 8)
    dist.barrier()
    rates = {}
    for name, settings in (
        ("polynomial", '{"lr_end": 1e-4}'),
        ("cosine_with_min_lr", '{"min_lr": 1e-4}'),
        ("cosine_warmup_with_min_lr", '{"min_lr": 1e-4}'),
    ):
        small_job.train(
            tmp_path, name, max_steps=4, per_device_train_batch_size=1, packing=False, lr_scheduler_type=name,
            lr_scheduler_kwargs=settings,
        )  # fmt: skip
        if dist.get_rank() == 0:
            rates[name] = [entry["learning_rate"] for entry in small_job.history(tmp_path, name) if "loss" in entry]
    if dist.get_rank() == 0:
        polynomial = [1e-3 - 0.9e-3 * step / 4 for step in range(4)]
        cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4))) for step in range(5)]
        assert rates["polynomial"] == pytest.approx(polynomial)
        assert rates["cosine_with_min_lr"] == pytest.approx(cosine[:4])
        assert rates["cosine_warmup_with_min_lr"] == pytest.approx(cosine[1:])
