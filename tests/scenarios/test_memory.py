"""Tests of the memory of a load: a rank holds only its shards and a bounded buffer, however large a parameter is."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from tests import models, quantised

BUFFER_BYTES = 64 * 2**20
SIZES = {"hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8, "num_hidden_layers": 1, "vocab_size": 131}


def peak_bytes() -> int:
    """Return the peak resident size since the last reset."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(params=["fp32", "fp8"])
def experts(request, tmp_path):
    """A checkpoint of 350 MB in fp32 or 8-bit floats; one parameter, the fused gate and up projections, is 65 % of it."""
    config = MixtralConfig(**SIZES)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    tensors = {name: torch.zeros(t.shape) for name, t in model.state_dict().items() if "experts." not in name}
    for i in range(SIZES["num_local_experts"]):
        prefix = f"model.layers.0.block_sparse_moe.experts.{i}"
        shapes = {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
        tensors |= {f"{prefix}.{name}.weight": torch.full(shape, 1.0 + i) for name, shape in shapes.items()}
    gate = tensors.pop("model.layers.0.mlp.gate.weight")
    save_file({**tensors, "model.layers.0.block_sparse_moe.gate.weight": gate}, tmp_path / "model.safetensors")
    folder = tmp_path if request.param == "fp32" else quantised.fp8(tmp_path, block=(128, 128))
    quantised.fp8(models.save_tiny("llama", folder / "warm"), block=(1, 1))
    return folder


@pytest.mark.world_size(2)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of peak memory")
def test_one_parameter_of_most_of_the_model(experts):
    """It is fused from 16 tensors and cast or dequantised. As a whole it would exceed the bound by 112 MiB."""
    from zero_sft import load_model
    from zero_sft.zero import shards

    load_model(str(experts / "warm"), ds_config=models.zero3())  # warm-up: imports, gloo's buffers
    reset_peak()
    before = peak_bytes()
    model = load_model(str(experts), ds_config=models.zero3(), dtype="bfloat16", buffer_mib=BUFFER_BYTES // 2**20)
    grown = peak_bytes() - before
    assert model.load_report.missing_keys == []
    kept = sum(param.ds_tensor.nbytes for param in model.parameters())
    largest = max(param.ds_numel for param in model.parameters()) * 2
    assert largest > BUFFER_BYTES
    assert kept <= grown <= kept + BUFFER_BYTES, (kept, grown)
    fused = dict(model.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    expert = shards.local_range(fused).start // (2 * SIZES["intermediate_size"] * SIZES["hidden_size"])
    assert float(shards.local_shard(fused)[0]) == 1.0 + expert
