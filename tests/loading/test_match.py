"""Tests that the parts of a checkpoint that the model lacks are named."""

import logging

import pytest

from tests import architectures, models
from zero_sft.loading.match import left_out_parts


def test_parts_by_their_names():
    names = ["model.layers.0.w", "model.embed_tokens.weight", "lm_head.weight"]
    unexpected = [
        "model.visual.blocks.0.w", "model.visual.blocks.1.w", "vision_tower.w", "model.layers.61.w", "mtp",
        "model.layers.0.rotary_emb.inv_freq",
    ]  # fmt: skip
    assert left_out_parts(unexpected, names) == {"model.layers.61": 1, "model.visual": 2, "mtp": 1, "vision_tower": 1}


@pytest.mark.world_size(2)
def test_a_vision_tower_that_is_left_out_is_said(tmp_path):
    from zero_sft import load_model
    from zero_sft.cluster.world import World

    main, said = World.detect().is_main, []
    if main:
        architectures.save("qwen3_5", tmp_path / "whole", towers=True)
    import torch

    torch.distributed.barrier()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("zero_sft").addHandler(handler)
    load_model(str(tmp_path / "whole"), ds_config=models.zero3())
    named = [sentence for sentence in said if "left out" in sentence and "model.visual" in sentence]
    assert len(named) == (1 if main else 0)
