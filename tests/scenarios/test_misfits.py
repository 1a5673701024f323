"""Tests of checkpoints that almost fit their model: the error names the difference."""

import pytest
from safetensors.torch import load_file, save_file

from tests import models
from tests.errors import raises

EXPERT = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture
def mixtral(tmp_path):
    return models.save_tiny("mixtral", tmp_path / "mixtral", max_shard_size="1GB")


def refusal_after(folder, change, code, *values):
    """Apply `change` to the checkpoint's dictionary of tensors, expect a refusal with `code`, and return its message."""
    from zero_sft import load_model

    tensors = load_file(folder / "model.safetensors")
    count = max(int(name.split(".")[5]) for name in tensors if name.startswith(f"{EXPERT}.")) + 1
    change(tensors, count)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with raises(f"checkpoint.{code}", *values) as caught:
        load_model(str(folder), ds_config=models.zero3(), dtype="bfloat16")
    return str(caught.value)


def test_one_part_of_one_expert(mixtral):
    part = f"{EXPERT}.1.w1.weight"
    message = refusal_after(mixtral, lambda tensors, _: tensors.pop(part), "not_convertible", f"'{part}'")
    assert "Traced" not in message
    assert "stock" not in message


def test_one_whole_expert(mixtral):
    def change(tensors, _):
        for part in ("w1", "w2", "w3"):
            del tensors[f"{EXPERT}.1.{part}.weight"]

    message = refusal_after(mixtral, change, "shapes_differ", f"'{EXPERT}.1.w")
    assert "ignore_mismatched_sizes" not in message


def test_the_last_expert(mixtral):
    def change(tensors, count):
        for part in ("w1", "w2", "w3"):
            del tensors[f"{EXPERT}.{count - 1}.{part}.weight"]

    refusal_after(mixtral, change, "shapes_differ", "mlp.experts.gate_up_proj")


def test_one_expert_too_many(mixtral):
    def change(tensors, count):
        for part in ("w1", "w2", "w3"):
            tensors[f"{EXPERT}.{count}.{part}.weight"] = tensors[f"{EXPERT}.0.{part}.weight"].clone()

    refusal_after(mixtral, change, "shapes_differ", "model.layers.0.mlp.experts.gate_up_proj")


def test_an_expert_far_beyond_the_others(mixtral):
    """One expert is surplus; the unused numbers before it do not count as missing experts."""

    def change(tensors, _):
        tensors[f"{EXPERT}.77.w2.weight"] = tensors[f"{EXPERT}.0.w2.weight"].clone()

    message = refusal_after(mixtral, change, "shapes_differ", "mlp.experts.down_proj", "ignore_mismatched_sizes")
    assert EXPERT not in message, "of no part it is said that it lacks"


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_experts_whole_and_in_parts(mixtral, target):
    def change(tensors, count):
        width = tensors[f"{EXPERT}.0.w1.weight"].shape
        shape = (count, 2 * width[0], width[1]) if target == "gate_up_proj" else (count, width[1], width[0])
        tensors[f"model.layers.0.mlp.experts.{target}"] = tensors[f"{EXPERT}.0.w1.weight"].new_zeros(shape)

    refusal_after(mixtral, change, "whole_and_in_parts", f"model.layers.0.mlp.experts.{target}")
