"""Each shipped DeepSpeed config under each launcher, as a user starts it: a step of training, and the export."""

import json

import pytest

from tests import models
from tests.launching import Started, deepspeed, torchrun
from zero_sft.packaged_file import packaged_file

CONFIGS = ("zero3", "zero3_offload", "zero3_zeropp", "zero3_nvme")


def config(name: str, folder) -> str:
    """The config as it is shipped; NVMe's with a folder and buffers that fit a test."""
    if name != "zero3_nvme":
        return name
    models.require_async_io()
    values = json.loads(packaged_file("ds_configs", f"{name}.json").read_text())
    for section in ("offload_param", "offload_optimizer"):
        values["zero_optimization"][section]["nvme_path"] = str(folder)
    values["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    path = folder / "nvme.json"
    path.write_text(json.dumps(values))
    return str(path)


def runs(command, folder) -> None:
    run = Started(command, folder / "log")
    try:
        assert run.wait(400) == 0, run.output[-4000:]
        assert (folder / "out" / "model.safetensors").is_file()
        assert run.left_after(10) == []
    finally:
        run.kill()


@pytest.mark.slow
def test_hpz_under_deepspeeds_launcher(job, tmp_path):
    """It sets LOCAL_SIZE, not LOCAL_WORLD_SIZE: each rank took another number for its node's ranks, and the load hung."""
    runs(deepspeed(2, *job(deepspeed="zero3_zeropp", max_steps=1)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_shipped_config_starts(job, tmp_path, name, launcher, ranks):
    runs(launcher(ranks, *job(deepspeed=config(name, tmp_path), max_steps=1)), tmp_path)
