"""Tests of the counts and names in the report of a sharded load, without ranks."""

import torch
from safetensors.torch import save_file

from tests import models
from zero_sft import transformers_internals
from zero_sft.checkpoint.index import read_index
from zero_sft.loading import sharded, skeleton
from zero_sft.loading.match import match_checkpoint
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.untraceable import ComputeCosts


def test_a_tie_that_is_stored_on_both_sides(tmp_path):
    """Parameters count once, and a persistent buffer is not a parameter."""
    config = models.tiny_config("qwen2")
    model, state = skeleton.build_on_meta(ModelSpec(folder=tmp_path, config=config, dtype=torch.float32))
    save_file({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, tmp_path / "model.safetensors")
    model.register_buffer("steps", torch.zeros(5, device="meta"))
    full = skeleton.Skeleton(model=model, state={**state, "steps": model.steps}, init=None)
    match = match_checkpoint(full, read_index(tmp_path), None, False)
    assert match.ties_with_both_stored() == [("lm_head.weight", "model.embed_tokens.weight")]
    transformers_internals.tie_weights(model, {"lm_head.weight"}, ())
    report = sharded._key_report(match, {"lm_head.weight"}, [], [], ComputeCosts(read_bytes=0, held_bytes={}), None)
    reference = models.AutoModelForCausalLM.from_config(config)
    assert report.parameters == sum(param.numel() for param in reference.parameters())
    assert report.tied_keys == ["lm_head.weight"]
