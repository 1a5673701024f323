"""A load that maps its shards from the page cache: equal to plain, trained as copied, and refused when the file has changed."""

import os
from unittest import mock

import pytest
import torch

from tests import models
from tests.errors import raises
from tests.zero.test_offload import ds_config, train
from zero_sft.storage import mapped


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


@pytest.fixture
def checkpoint(tmp_path, architecture):
    return models.save_tiny(architecture, tmp_path / architecture)


def load(folder, **options):
    """With shards of a few bytes mapped, too; the checkpoint was just written, so it is cached."""
    from zero_sft import load_model

    with mock.patch.object(mapped, "SMALLEST_BYTES", 1):
        return load_model(str(folder), **{"ds_config": models.zero3(), **options})


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_bit_for_bit(checkpoint):
    reference = models.plain(checkpoint, torch.bfloat16)
    model = load(checkpoint)
    models.assert_equal(model, reference)
    report = model.load_report
    everyone = [each["bytes_mapped"] for each in report.ranks]
    assert all(0 < each <= numbers["bytes_read"] for each, numbers in zip(everyone, report.ranks, strict=True))
    assert "of that mapped from the page cache" in report.summary()


@pytest.mark.world_size(2)
def test_only_where_it_may_be(llama):
    assert load(llama, mmap=False).load_report.bytes_mapped == 0
    assert load(llama, ds_config=models.zero3(False)).load_report.bytes_mapped == 0, "cast"
    for pin_memory in (True, False):  # pinned memory is what devices copy from
        offload = {"offload_param": {"device": "cpu", "pin_memory": pin_memory}}
        report = load(llama, ds_config=models.zero3(zero_optimization=offload)).load_report
        assert (report.bytes_mapped > report.bytes_read / 2) == (not pin_memory), report.ranks


@pytest.mark.world_size(2)
@pytest.mark.parametrize("offload", ["none", "all"])
def test_trained_as_copied(llama, offload):
    """An engine moves the shards, writes to its own memory, and the files stay as they are."""
    contents = {path: path.read_bytes() for path in llama.iterdir()}
    host = {"device": "cpu", "pin_memory": False}
    ds = ds_config(**({} if offload == "none" else {"offload_param": host, "offload_optimizer": host}))
    with mock.patch.object(mapped, "SMALLEST_BYTES", 1):
        losses = train(llama, ds, "sharded")
    assert losses == train(llama, ds, "stock")
    assert contents == {path: path.read_bytes() for path in llama.iterdir()}


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("part", "cut"), [(False, False), (True, False), (False, True)])
def test_an_engine_does_not_start_on_changed_files(llama, part, cut):
    """Over the whole model where one file was written to or cut short, nor over a part of it where all were."""
    import deepspeed
    import torch.distributed as dist

    ds = ds_config()
    with mock.patch.object(mapped, "SMALLEST_BYTES", 1):
        model = load(llama, ds_config=ds)
    dist.barrier()
    if dist.get_rank() == 0:
        files = list(llama.glob("*.safetensors"))
        for file in files if part else files[:1]:
            os.truncate(file, 0) if cut else os.utime(file, ns=(1, 1))
    dist.barrier()
    trained = model.model if part else model
    with raises("checkpoint.changed_while_read"):
        deepspeed.initialize(model=trained, config=ds, model_parameters=trained.parameters())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("optimizer", [False, True])
def test_after_an_engines_start_files_are_no_matter(llama, optimizer):
    """Replaced files don't keep it from starting, and no shard is a part of a file then, with an optimizer or without."""
    import deepspeed
    import torch
    import torch.distributed as dist

    ds = ds_config()
    if not optimizer:
        ds.pop("optimizer", None)
    with mock.patch.object(mapped, "SMALLEST_BYTES", 1):
        model = load(llama, ds_config=ds)
    assert model.load_report.bytes_mapped
    dist.barrier()
    files = sorted(llama.glob("*.safetensors"))
    if dist.get_rank() == 0:
        for file in files:
            file.with_suffix(".new").write_bytes(bytes(file.stat().st_size))
            file.with_suffix(".new").replace(file)
    dist.barrier()
    given = {"model_parameters": model.parameters()} if optimizer else {}
    engine, *_ = deepspeed.initialize(model=model, config=ds, **given)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = engine(input_ids=ids).logits
    assert logits.abs().max() > 0.1
    assert not any("_zero_sft_mapped_from" in param.__dict__ for param in model.parameters())


@pytest.mark.world_size(2)
def test_verified(llama):
    model = load(llama, verify=True)
    assert model.load_report.verified
