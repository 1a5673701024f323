"""Compare loads of `pytorch_model.bin` checkpoints with plain `from_pretrained`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.errors import raises


@pytest.fixture(params=["one file", "many files"])
def folder(request, tmp_path, architecture):
    """A tiny `.bin` checkpoint with one matrix stored as a transposed view of another's memory, as in some old files."""
    source = models.save_tiny(architecture, tmp_path / "safe", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    target = tmp_path / "bin"
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    if request.param == "one file":
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.world_size(1, 3)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_as_plain_loading(folder):
    from zero_sft import load_model

    reference = models.plain(folder, torch.bfloat16)
    model = load_model(str(folder), ds_config=models.zero3(), dtype="bfloat16")
    models.assert_equal(model, reference)
    assert model.load_report.missing_keys == []


@pytest.fixture
def legacy(tmp_path):
    folder = models.save_tiny("llama", tmp_path / "old", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.world_size(2)
def test_a_legacy_pickle_is_refused_with_the_command_that_converts_it(legacy):
    from zero_sft import load_model

    with raises("checkpoint.not_a_zip", "torch.save(torch.load"):
        load_model(str(legacy), ds_config=models.zero3())
