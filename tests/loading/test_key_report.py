"""Tests of the counts and names in the report of a sharded load, without ranks."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests import models
from zero_sft import transformers_internals
from zero_sft.checkpoint.index import read_index
from zero_sft.cluster.world import World
from zero_sft.loading import sharded, skeleton
from zero_sft.loading.match import match_checkpoint
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import LoadRequest, ModelSpec
from zero_sft.loading.untraceable import ComputeCosts


@pytest.fixture
def spec(tmp_path):
    return ModelSpec(folder=tmp_path, config=models.tiny_config("qwen2"), dtype=torch.float32)


@pytest.fixture
def match(spec):
    """Return a model with a tie and a persistent buffer, and its checkpoint, which has both sides of the tie."""
    model, state = skeleton.build_on_meta(spec)
    model.register_buffer("steps", torch.zeros(5, device="meta"))
    state["steps"] = model.steps
    save_file({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, spec.folder / "model.safetensors")
    spec.config.save_pretrained(spec.folder)
    unsharded = SimpleNamespace(
        local_device=torch.device("cpu"), make_zero_parameters=lambda model: None, make_zero_parameter=None
    )
    full = skeleton.Skeleton(model=model, state=state, sharder=unsharded)
    return match_checkpoint(full, read_index(spec.folder), None, False)


def test_a_tie_that_is_stored_on_both_sides(match, spec):
    """Parameters count once, and a buffer is not a parameter."""
    assert match.ties_with_both_stored() == [("lm_head.weight", "model.embed_tokens.weight")]
    transformers_internals.tie_weights(match.skeleton.model, {"lm_head.weight"}, ())
    report = sharded._key_report(match, {"lm_head.weight"}, [], [], ComputeCosts(reads=(), held_bytes={}), None)
    reference = models.AutoModelForCausalLM.from_config(spec.config)
    assert report.parameters == sum(param.numel() for param in reference.parameters())
    assert report.tied_keys == ["lm_head.weight"]


def test_reads_of_the_initialisation_count(match, spec, monkeypatch):
    """A stored buffer is read whole while the model is initialised. The parameters are not sharded here, so none is read."""
    monkeypatch.setattr(sharded, "_match", lambda *_: match)
    monkeypatch.setattr(sharded, "_drop_unequal_ties", lambda *_: {"lm_head.weight"})
    monkeypatch.setattr(transformers_internals, "keep_zero3_enabled", lambda *_: None)
    request = LoadRequest(name="x", model=spec, ds_config={}, seed=0, variant=None, options=LoadOptions())
    _, _, stats = sharded.load_sharded(request, World())
    assert (stats.requests, stats.bytes_read) == (1, 5 * 4)
    assert list(stats.stages) == ["initialise", "read", "plan", "finish"]
