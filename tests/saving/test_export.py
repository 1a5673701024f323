"""What is exported reads back through plain transformers, bit for bit, and a failed export leaves the target as it was."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests import architectures, models
from tests.errors import raises


@pytest.fixture
def checkpoint(tmp_path, architecture):
    return models.save_tiny(architecture, tmp_path / architecture)


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.world_size(1)
def test_an_empty_path_is_not_the_working_directory():
    from torch import nn

    from zero_sft import load_model, save_pretrained

    with raises("export.no_folder_named", "empty"):
        save_pretrained(nn.Linear(1, 1), "")
    with raises("hub.no_such_folder", "empty"):
        load_model("", ds_config=models.zero3())


@pytest.mark.world_size(3)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_round_trip(checkpoint, tmp_path, max_file_bytes):
    from zero_sft import load_model, save_pretrained

    reference = models.plain(checkpoint, torch.bfloat16)
    model = load_model(str(checkpoint), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out", max_file_bytes=max_file_bytes)
    del model  # and with it transformers' knowledge that ZeRO-3 is on
    again = models.plain(tmp_path / "out", torch.bfloat16)
    assert same_state(again, reference)
    assert again.config.dtype == torch.bfloat16
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in files) == (max_file_bytes == 10**9)
    assert "config.json" in files
    assert "deepspeed" not in " ".join(path.read_text().lower() for path in (tmp_path / "out").glob("*.json"))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.fixture
def gemma3(tmp_path):
    return architectures.save("gemma3", tmp_path / "gemma3")


@pytest.mark.world_size(2)
def test_a_model_that_builds_another_in_its_constructor(gemma3, tmp_path):
    """Rank 0 builds it once more to compare: while a model is alive, that one must not open a `zero.Init`, and wait."""
    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    reference = models.plain(gemma3, torch.bfloat16)
    if World.detect().is_main:
        (gemma3 / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    model = load_model(str(gemma3), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out")
    del model
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"image_processor_type": "Gemma3ImageProcessor"}'
    assert same_state(models.plain(tmp_path / "out", torch.bfloat16), reference)


@pytest.mark.world_size(1, 3)
@pytest.mark.parametrize("architecture", ["mixtral"])
def test_the_format_is_the_published_one(checkpoint, tmp_path):
    """File for file what plain `save_pretrained` writes: experts one by one, under their published names."""
    from safetensors.torch import load_file

    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    model = load_model(str(checkpoint), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out")
    if not World.detect().is_main:
        return
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in found
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.world_size(2)
def test_names_that_would_not_load_back_are_not_written(tmp_path):
    """A model whose conversion can't be reverted is written under its own names, and says so."""
    from unittest import mock

    from safetensors.torch import load_file

    from zero_sft import load_model, save_pretrained
    from zero_sft.saving import export_layout as export

    folder = models.save_tiny("mixtral", tmp_path / "mixtral")
    model = load_model(str(folder), ds_config=models.zero3())

    def no_way_back(*_):
        raise ValueError("no way back")

    with (
        mock.patch.object(export, "published_format", no_way_back),
        mock.patch.object(export.logger, "warning") as warning,
    ):
        save_pretrained(model, tmp_path / "out")
    assert "no way back" in str(warning.call_args)
    del model
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "out" / "model.safetensors")
    assert same_state(models.plain(tmp_path / "out", torch.bfloat16), models.plain(folder, torch.bfloat16))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("architecture", ["mixtral"])
def test_one_rank_alone_that_can_not_write_the_published_names(checkpoint, tmp_path):
    """All ranks write the model's own names then, and each says so once (the job shows what rank 0 says)."""
    from unittest import mock

    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World
    from zero_sft.saving import export_layout as export

    model = load_model(str(checkpoint), ds_config=models.zero3())

    def no_way_back(*_):
        raise ValueError("no way back")

    way_back = no_way_back if World.detect().rank == 1 else export.published_format
    with mock.patch.object(export, "published_format", way_back), mock.patch.object(export.logger, "warning") as warning:
        save_pretrained(model, tmp_path / "out")
    assert warning.call_count == 1
    assert "no way back" in str(warning.call_args)
    del model
    assert same_state(models.plain(tmp_path / "out", torch.bfloat16), models.plain(checkpoint, torch.bfloat16))


@pytest.mark.world_size(2)
def test_ranks_that_would_write_other_files_write_none(llama, tmp_path):
    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    model = load_model(str(llama), ds_config=models.zero3())
    with raises("cluster.ranks_disagree", "files of the export"):
        save_pretrained(model, tmp_path / "out", max_file_bytes=20_000 if World.detect().rank else 10**9)
    torch.distributed.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.world_size(2)
def test_after_training_through_the_engine(llama, tmp_path):
    """The exported weights are the engine's: those that `GatheredParameters` shows after the steps."""
    import deepspeed

    from zero_sft import load_model, save_pretrained

    ds = models.zero3(train_micro_batch_size_per_gpu=1, optimizer={"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}})
    model = load_model(str(llama), ds_config=ds)
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())
    ids = torch.arange(8).view(1, 8) + 3
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    expected = {name: models.gather_full(param) for name, param in engine.module.named_parameters()}
    save_pretrained(engine, tmp_path / "out")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_config_states_the_dtype_of_the_weights(llama, tmp_path, dtype):
    """A loaded model that is cast, as plain `save_pretrained` writes it."""
    from safetensors.torch import load_file

    from zero_sft import load_model, save_pretrained

    models.plain(llama, torch.bfloat16).to(dtype).save_pretrained(tmp_path / "plain")
    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model.to(dtype), tmp_path / "out")
    torch.distributed.barrier()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    written, plain = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "plain"))
    assert written["dtype"] == written["torch_dtype"] == plain["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.world_size(2)
def test_an_existing_folder_keeps_what_is_not_the_models(llama, tmp_path):
    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    out = tmp_path / "out"
    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model, out, max_file_bytes=20_000)
    if World.detect().is_main:
        (out / "notes.txt").write_text("mine")
    save_pretrained(model, out)
    torch.distributed.barrier()
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.world_size(2)
def test_a_failed_export_leaves_the_target_as_it_was(llama, tmp_path):
    from unittest import mock

    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World
    from zero_sft.saving import weight_files

    out = tmp_path / "out"
    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(handle, path, *rest):
        raise OSError(28, "No space left on device", str(path))

    with raises("export.unwritable", "No space left"):
        with mock.patch.object(weight_files, "write_copy", full if World.detect().rank == 1 else weight_files.write_copy):
            save_pretrained(model, out)
    torch.distributed.barrier()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in Path(out).parent.iterdir() if path.name.endswith(".part")]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_where_a_file_belongs_is_refused_before_anything_is_changed(llama, tmp_path, name):
    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    out = tmp_path / "out"
    model = load_model(str(llama), ds_config=models.zero3())
    if World.detect().is_main:
        (out / name).mkdir(parents=True)
        (out / name / "keep").write_text("mine")
    torch.distributed.barrier()
    with raises("export.folder_in_place_of_file", str(out), name):
        save_pretrained(model, out)
    torch.distributed.barrier()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("out/**/*")] == [f"out/{name}", f"out/{name}/keep"]
    assert not list(tmp_path.glob(".*.part")), "the staging folder is removed"


def test_unwritable_is_found_before_the_training(tmp_path):
    from zero_sft.saving.folder import require_writable

    (tmp_path / "file").write_text("in the way")
    with raises("export.unwritable"):
        require_writable(tmp_path / "file" / "out")
    require_writable(tmp_path / "new" / "out")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.world_size(2)
def test_tokenizer_and_generation_settings_come_along(llama, tmp_path):
    from zero_sft import load_model, save_pretrained

    settings = json.loads((llama / "generation_config.json").read_text())
    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out")
    again = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert again.get("eos_token_id") == settings.get("eos_token_id")


@pytest.mark.world_size(2)
def test_only_former_weights_are_replaced(llama, tmp_path):
    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World

    out = tmp_path / "out"
    former = ["model-00001-of-00009.safetensors", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    others = ["model-backup.safetensors", "model_notes.safetensors", "model.fp16.safetensors", "pytorch_model_fsdp.bin"]
    model = load_model(str(llama), ds_config=models.zero3())
    if World.detect().is_main:
        out.mkdir()
        for name in (*former, *others):
            (out / name).write_bytes(b"x")
    torch.distributed.barrier()
    save_pretrained(model, out)
    names = {path.name for path in out.iterdir()}
    assert names >= {*others, "model.safetensors"}
    assert not names & set(former)


def test_pad_token_and_cache_in_what_is_saved(llama, tmp_path):
    from tests.data import tiny
    from zero_sft import load_model, prepare_config, save_pretrained

    tokenizer = tiny.byte_tokenizer()
    model = load_model(str(llama), ds_config=models.zero3(), config=prepare_config(str(llama)))
    assert model.config.use_cache is False
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert config["use_cache"] is True
