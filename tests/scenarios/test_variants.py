"""Compare loads of a variant's weights with plain `from_pretrained`."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import models
from tests.errors import raises

SHARD_SIZES = {"one file": "1GB", "many files": "20KB"}


@pytest.fixture(params=[*SHARD_SIZES, "older names", "bin"])
def folder(request, tmp_path):
    """Default weights and different weights of the variant "fp16"; also sharded files with the names before 4.46."""
    kind = request.param
    folder = models.save_tiny("llama", tmp_path / "both")
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(models.tiny_config("llama"), dtype=torch.bfloat16)
    other.save_pretrained(folder, variant="fp16", max_shard_size=SHARD_SIZES.get(kind, "20KB"))
    if kind == "older names":
        index = folder / "model.safetensors.index.fp16.json"
        text = index.read_text()
        for path in list(folder.glob("model.fp16-*.safetensors")):
            number = path.name.removeprefix("model.fp16").removesuffix(".safetensors")
            path.rename(folder / f"model{number}.fp16.safetensors")
            text = text.replace(path.name, f"model{number}.fp16.safetensors")
        index.write_text(text)
    elif kind == "bin":
        tensors = {}
        for path in [*folder.glob("model.fp16*.safetensors"), folder / "model.safetensors.index.fp16.json"]:
            tensors |= load_file(path) if path.suffix == ".safetensors" else {}
            path.unlink()
        torch.save(tensors, folder / "pytorch_model.fp16.bin")
    return folder


@pytest.mark.world_size(2)
def test_as_plain_loading(folder):
    from zero_sft import load_model

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, variant="fp16")
    plain = models.plain(folder, torch.bfloat16)
    model = load_model(str(folder), ds_config=models.zero3(), dtype="bfloat16", variant="fp16")
    models.assert_equal(model, reference)
    with pytest.raises(AssertionError):
        models.assert_equal(model, plain)


def test_a_variant_that_is_not_there(tmp_path):
    from zero_sft import load_model

    folder = models.save_tiny("llama", tmp_path / "plain")
    with raises("checkpoint.no_weights", "expected model.fp16.safetensors"):
        load_model(str(folder), ds_config=models.zero3(), variant="fp16")


@pytest.mark.parametrize("variant", ["../x", "a/b", ".", ""])
def test_a_variant_is_a_part_of_a_name(tmp_path, variant):
    from zero_sft import load_model

    folder = models.save_tiny("llama", tmp_path / "plain")
    with raises("hub.bad_variant"):
        load_model(str(folder), ds_config=models.zero3(), variant=variant)
