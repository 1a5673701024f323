"""Headers that are derived from a config are those of the checkpoint that plain transformers writes."""

import json
from pathlib import Path

import pytest

from tests import models
from tests.errors import raises
from tests.slow import slow_except
from zero_sft.checkpoint.index import read_index
from zero_sft.estimate.model import find_model
from zero_sft.estimate.simulate import simulate_load
from zero_sft.estimate.storage_profiles import MODELS, shipped_models
from zero_sft.hub.options import HubOptions

PUBLISHED = {  # elements of the models' own weights, as their cards and index files have them
    "DeepSeek-V3": 671_026_419_200, "Llama-3.1-405B": 405_853_388_800, "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248, "Mixtral-8x22B": 140_620_634_112, "Qwen3-235B-A22B": 235_093_634_560,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "qwen2"])
def test_derived_headers_are_those_of_a_plain_save(tmp_path, kind):
    folder = Path(models.save_tiny(kind, tmp_path / kind))
    read = read_index(folder).tensors
    bare = tmp_path / "config.json"
    bare.write_text((folder / "config.json").read_text())
    derived = find_model(str(bare), HubOptions())
    assert derived.headers == "derived"
    stored = derived.resolution.stored_tensors
    assert {name: (each.dtype, each.shape) for name, each in stored.items()} == {
        name: (each.dtype, each.shape) for name, each in read.items()
    }
    from_folder = find_model(str(folder), HubOptions())
    assert from_folder.headers == "read"
    for world_size in (1, 3, 8):
        derived_loads, read_loads = simulate_load(derived, world_size), simulate_load(from_folder, world_size)
        assert [each.nbytes for each in derived_loads] == [each.nbytes for each in read_loads]


@pytest.mark.parametrize("name", slow_except({"Llama-3.1-8B", "Mixtral-8x22B"}, shipped_models()))
def test_shipped_models_have_their_published_size(name):
    of = find_model(name, HubOptions())
    assert sum(each.numel() for each in of.state.values()) == PUBLISHED[name]
    assert not of.resolution.unexpected
    assert not of.resolution.untraceable
    assert of.resolution.filled_names == set(of.state)


@pytest.mark.slow
def test_deepseek_is_stored_in_eight_bits_as_published():
    """Some 90,000 tensors: attention, experts and dense layers in FP8 with scales; norms, embeddings, head and routers not."""
    of = find_model("DeepSeek-V3", HubOptions())
    stored = of.resolution.stored_tensors
    by_name = {name: stored[name].dtype for name in stored if " * " not in name}
    assert len(by_name) == of.tensors == 90_427
    assert by_name["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == "F8_E4M3"
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert by_name["model.layers.60.mlp.experts.255.down_proj.weight"] == "F8_E4M3"
    for plain in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.3.mlp.gate.weight", "model.norm.weight"):
        assert by_name[plain] == "BF16", plain


def test_what_can_not_be_estimated(tmp_path):
    with raises("estimate.no_such_model", "DeepSeek-V3"):
        find_model("no-such-model", HubOptions(local_files_only=True))
    broken = tmp_path / "config.json"
    broken.write_text("{}")
    with raises("config.unusable"):
        find_model(str(broken), HubOptions())
    broken.write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with raises("config.unusable"):
        find_model(str(broken), HubOptions())


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = Path(models.save_tiny("llama", tmp_path / "llama"))
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with raises("checkpoint.truncated", "truncated"):
        find_model(str(folder), HubOptions())


def test_shipped_configs_are_plain_json():
    for path in MODELS.glob("*.json"):
        assert json.loads(path.read_text())["model_type"]
