"""Compare loads of published checkpoint layouts that differ from the model's with plain `from_pretrained`."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests import architectures, models
from tests.data import tiny
from tests.errors import raises


def rewritten(folder, change):
    """Save the checkpoint in one file, after `change` was applied to its dictionary of tensors."""
    tensors = change({name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()})
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def same_as_plain(folder, engine, **options):
    from zero_sft import load_model

    wanted = getattr(torch, engine)
    auto = options.get("model_class")
    reference = models.plain(folder, wanted) if auto is None else auto.from_pretrained(folder, dtype=wanted)
    model = load_model(str(folder), ds_config=models.zero3(bf16=engine == "bfloat16"), dtype=wanted, verify=True, **options)
    models.assert_equal(model, reference, cast=wanted if engine == "bfloat16" else None)
    assert not model.load_report.missing_keys
    return model


@pytest.fixture
def mixed(tmp_path, architecture):
    """A checkpoint in which consecutive tensors have different dtypes, integers among them."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.float64, torch.int8]

    def change(tensors):
        return {
            name: (tensor.float() * 50).round().to(dtypes[i % 6])
            if not dtypes[i % 6].is_floating_point
            else tensor.to(dtypes[i % 6])
            for i, (name, tensor) in enumerate(sorted(tensors.items()))
        }

    return rewritten(models.save_tiny(architecture, tmp_path / architecture), change)


@pytest.mark.world_size(1, 3)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("engine", ["bfloat16", "float32"])
def test_many_dtypes_in_one_file(mixed, engine):
    assert same_as_plain(mixed, engine).load_report.cast_keys


@pytest.fixture
def layout(tmp_path, kind):
    if kind == "base model, from the whole":
        return models.save_tiny("llama", tmp_path / "x"), {"model_class": AutoModel}
    if kind == "whole, from the base model's prefix":
        folder = models.save_tiny("gpt2", tmp_path / "x")
        return rewritten(folder, lambda t: {n.removeprefix("transformer."): each for n, each in t.items()}), {}
    if kind == "old names":
        folder = architectures.save("bert", tmp_path / "x")
        old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}

        def change(tensors):
            return {next((n.replace(new, then) for new, then in old.items() if new in n), n): t for n, t in tensors.items()}

        return rewritten(folder, change), {}
    folder = models.save_tiny("mixtral", tmp_path / "x")  # each expert in a separate file
    tensors = {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    files = {
        name: f"model-{int(name.split('.')[5]) if '.experts.' in name else 99:05d}-of-00100.safetensors" for name in tensors
    }
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder, {}


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "kind", ["base model, from the whole", "whole, from the base model's prefix", "old names", "one parameter over many files"]
)
def test_layouts(layout):
    folder, options = layout
    same_as_plain(folder, "bfloat16", **options)


@pytest.fixture
def outer(tmp_path):
    models.save_tiny("qwen2", tmp_path / "outer" / "inner")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "outer" / "inner")
    return tmp_path / "outer"


@pytest.mark.world_size(2)
def test_the_tokenizer_is_set_up_while_the_weights_are_read(outer):
    """Rank 0's reads wait until the set-up of the tokenizer has begun on another thread."""
    from unittest import mock

    from zero_sft import load_pretrained
    from zero_sft.cluster.world import World
    from zero_sft.storage import reader
    from zero_sft.tokenizer import TokenizerSpec

    begun, prepare, fill = threading.Event(), TokenizerSpec.prepare, reader.fill

    def prepare_and_say(spec, source):
        assert threading.current_thread() is not threading.main_thread()
        begun.set()
        return prepare(spec, source)

    def fill_when_begun(*args, **kwargs):
        assert begun.wait(60)
        return fill(*args, **kwargs)

    is_main = World.detect().is_main
    with (
        mock.patch.multiple(TokenizerSpec, prepare=prepare_and_say),
        mock.patch.object(reader, "fill", fill_when_begun if is_main else fill),
    ):
        load_pretrained(str(outer / "inner"), ds_config=models.zero3(), model_max_length=32)
    assert begun.is_set() == is_main


@pytest.mark.world_size(2)
def test_a_folder_inside(outer):
    from zero_sft import load_pretrained

    reference = models.plain(outer / "inner", torch.bfloat16)
    options = {"ds_config": models.zero3(), "model_max_length": 32}
    model, tokenizer = load_pretrained(str(outer), subfolder="inner", **options)
    models.assert_equal(model, reference)
    assert len(tokenizer) == len(tiny.byte_tokenizer())
    leaves = "hub.subfolder_leaves_folder"
    for wrong, code in (("nosuch", "hub.no_such_subfolder"), ("../outer", leaves), (str(outer), leaves)):
        with raises(code, wrong):
            load_pretrained(str(outer), subfolder=wrong, **options)
