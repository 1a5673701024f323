"""Tests of headers that are read once per cluster: the index equals that of a single reader, and one rank opens each file."""

import json
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from tests import models
from tests.errors import raises


@pytest.fixture(params=["safetensors", "bin"])
def many(request, tmp_path):
    """A checkpoint in about 21 files, with one tensor in each."""
    import torch

    folder = models.save_tiny("llama", tmp_path / "many")
    tensors = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    stem, kind = ("model", "safetensors") if request.param == "safetensors" else ("pytorch_model", "bin")
    weight_map = {name: f"{stem}-{i:05d}-of-00099.{kind}" for i, name in enumerate(tensors)}
    for name, file in weight_map.items():
        if kind == "bin":
            torch.save({name: tensors[name]}, folder / file)
        else:
            save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.world_size(1, 2, 3, 8, slow=(2, 8))
def test_each_header_is_read_once(many):
    from zero_sft import load_model
    from zero_sft.checkpoint import index
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.cluster.world import World
    from zero_sft.storage import torch_zip

    reference = index.read_index(many, torch_zip.read_bin_header)
    read, true_header, true_zip = [], index.read_header, torch_zip.read_bin_header
    with (
        mock.patch.object(index, "read_header", lambda path: [read.append(str(path)), true_header(path)][1]),
        mock.patch.object(torch_zip, "read_bin_header", lambda path: [read.append(str(path)), true_zip(path)][1]),
    ):
        model = load_model(str(many), ds_config=models.zero3(), verify=True)
    assert model.load_report.missing_keys == []
    world = World.detect()
    everyone = [path for theirs in all_gather_json(world, read) for path in theirs]
    assert sorted(everyone) == sorted(reference.identities)
    assert len(everyone) > 8


@pytest.mark.world_size(3)
def test_the_index_is_the_one_read_alone(many):
    from zero_sft.checkpoint.index import build_index, find_checkpoint_files, read_index
    from zero_sft.cluster.world import World
    from zero_sft.loading.headers import read_headers_together
    from zero_sft.storage import torch_zip
    from zero_sft.zero.process_group import connect

    world = World.detect()
    connect(world)
    files = find_checkpoint_files(many, torch_zip.read_bin_header)
    assert build_index(files, read_headers_together(files, world)) == read_index(many, torch_zip.read_bin_header)


@pytest.fixture
def damaged(many):
    path = sorted(many.glob("*-00004-of-*"))[0]
    path.write_bytes(path.read_bytes()[:40])
    return many


@pytest.mark.world_size(3)
def test_a_damaged_header_is_one_error_on_every_rank(damaged):
    from zero_sft import load_model

    kind = "not_a_zip" if any(damaged.glob("*.bin")) else "header_too_long"
    with raises(f"checkpoint.{kind}", "-00004-of-00099", "rank 1 of 3"):
        load_model(str(damaged), ds_config=models.zero3())


@pytest.fixture
def copy(many, tmp_path):
    """A copy on another node's disk, with one longer file."""
    import shutil

    shutil.copytree(many, tmp_path / "copy")
    path = sorted((tmp_path / "copy").glob("*-00004-of-*"))[0]
    path.write_bytes(path.read_bytes() + b"x")
    return tmp_path / "copy"


@pytest.mark.world_size(3)
def test_ranks_that_see_other_files(many, copy):
    from zero_sft import load_model
    from zero_sft.cluster.world import World

    with raises("cluster.ranks_disagree", "checkpoint's files", "00004-of-00099"):
        load_model(str(copy if World.detect().rank == 2 else many), ds_config=models.zero3())
