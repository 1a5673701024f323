"""Widely copied DeepSpeed configs run as they are: a step and an export on two CPU ranks."""

import json

import pytest

from tests import small_job
from tests.published.ds_configs import DS_CONFIGS

QUICK = ("transformers' documentation, offloaded", "a decaying scheduler and stage-2 keys")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in DS_CONFIGS if name not in QUICK]


@pytest.fixture
def job_folder(tmp_path):
    return small_job.make(tmp_path, samples=8)


@pytest.mark.world_size(2, timeout_s=240)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_runs_as_published(job_folder, name):
    bf16 = DS_CONFIGS[name].get("bf16", {}).get("enabled", False) is True
    config = json.dumps(DS_CONFIGS[name])
    small_job.train(job_folder, "out", deepspeed=config, max_steps=2, per_device_train_batch_size=2, bf16=bf16)
    assert len(small_job.losses(job_folder, "out")) == 2
    assert (job_folder / "out" / "model.safetensors").exists()
