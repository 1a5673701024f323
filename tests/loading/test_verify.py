"""Tests of the load options for verification, strictness and mismatched shapes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.errors import raises


@pytest.fixture(params=["llama", "mixtral", "qwen2"])
def folder(request, tmp_path):
    return models.save_tiny(request.param, tmp_path / request.param)


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama", max_shard_size="1GB")


def load(folder, **options):
    from zero_sft import load_model

    return load_model(str(folder), ds_config=models.zero3(), dtype="bfloat16", **options)


@pytest.mark.world_size(1, 3)
def test_read_back(folder):
    model = load(folder, verify=True, strict=True)
    assert model.load_report.verified == len(dict(model.named_parameters()))
    assert "read back" in model.load_report.summary()


@pytest.mark.world_size(3)
@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_one_wrong_bit_on_one_rank_is_found(folder, faulty):
    """Flip a bit on one rank, as faulty memory would."""
    from unittest import mock

    from zero_sft.cluster.world import World
    from zero_sft.storage import reader

    true_fill = reader.fill

    def fill(reads, memory, *options):
        done = true_fill(reads, memory, *options)
        name = next(iter(memory))
        memory[name].view(torch.uint8)[0] ^= 1
        return done

    with raises("checkpoint.verification_failed", f"1 in all, first on rank {faulty}"):
        if World.detect().rank == faulty:
            with mock.patch.object(reader, "fill", fill):
                load(folder, verify=True)
        else:
            load(folder, verify=True)


@pytest.fixture
def incomplete(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["another.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    return llama


@pytest.mark.world_size(2)
def test_strict(incomplete):
    with raises("checkpoint.not_strict", "missing: model.norm.weight", "unexpected: another.weight"):
        load(incomplete, strict=True)
    assert load(incomplete).load_report.missing_keys == ["model.norm.weight"]


@pytest.fixture
def wider(llama):
    """A config with a larger vocabulary than the weights have."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 2}))
    return llama


@pytest.mark.world_size(2)
def test_other_shapes(wider):
    with raises("checkpoint.shapes_differ", "model.embed_tokens.weight: expected [133, 30], got [131, 30]"):
        load(wider)
    model = load(wider, ignore_mismatched_sizes=True)
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    assert sorted(name for name, _, _ in model.load_report.mismatched_keys) == names
    assert model.load_report.missing_keys == []
    assert all(float(p.ds_tensor.float().abs().sum()) > 0 for n, p in model.named_parameters() if n in names)
