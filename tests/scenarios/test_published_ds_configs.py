"""Widely copied DeepSpeed configs run as they are: a step and an export on two CPU ranks."""

import json

import pytest

from tests import small_job
from tests.published.ds_configs import DS_CONFIGS
from tests.slow import slow_except

QUICK = ("a decaying scheduler and stage-2 keys",)


@pytest.fixture
def job_folder(tmp_path):
    return small_job.make(tmp_path, samples=8)


@pytest.mark.world_size(2, timeout_s=240)
@pytest.mark.parametrize("name", slow_except(QUICK, DS_CONFIGS))
def test_runs_as_published(job_folder, name):
    # An argument that names another schedule than the config's section is refused.
    schedules = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}
    schedule = schedules.get(DS_CONFIGS[name].get("scheduler", {}).get("type"), "constant")
    bf16 = DS_CONFIGS[name].get("bf16", {}).get("enabled", False) is True
    config = json.dumps(DS_CONFIGS[name])
    small_job.train(
        job_folder, "out", deepspeed=config, max_steps=2, per_device_train_batch_size=2, bf16=bf16,
        lr_scheduler_type=schedule,
    )  # fmt: skip
    assert len(small_job.losses(job_folder, "out")) == 2
    assert (job_folder / "out" / "model.safetensors").exists()
