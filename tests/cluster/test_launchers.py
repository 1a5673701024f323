"""Each shipped DeepSpeed config under each launcher, on two to four ranks: a step of training, and the export."""

import json

import pytest

from tests import models
from tests.launching import Started, deepspeed, torchrun
from zero_sft.packaged_file import packaged_file


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
@pytest.mark.parametrize(
    ("name", "launcher", "ranks"),
    [
        ("zero3", deepspeed, 3), ("zero3", torchrun, 2), ("zero3_offload", deepspeed, 2), ("zero3_offload", torchrun, 3),
        # DeepSpeed's launcher sets LOCAL_SIZE, not LOCAL_WORLD_SIZE: hpZ depends on the number of ranks on the node.
        ("zero3_zeropp", deepspeed, 2), ("zero3_zeropp", deepspeed, 4), ("zero3_zeropp", torchrun, 3),
        ("zero3_nvme", deepspeed, 3), ("zero3_nvme", torchrun, 2),
    ],
)  # fmt: skip
def test_each_shipped_config_starts(job, tmp_path, name, launcher, ranks):
    runs(launcher(ranks, *job(deepspeed=config(name, tmp_path), max_steps=1)), tmp_path)
