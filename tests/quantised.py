"""Quantise plain checkpoints: 8-bit floats with one scale per block, as DeepSeek-V3 and others publish them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight in 8 bits, and its scales; blocks at the edges may be smaller."""
    rows, cols = weight.shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :cols] = weight.float()
    tiles = padded.view(grid[0], block[0], grid[1], block[1])
    scales = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
    quantised = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantised.view(padded.shape)[:rows, :cols].contiguous(), scales


def fp8(folder: Path, block: tuple[int, int], *, suffix: str = "_scale_inv", scale_dtype: torch.dtype = torch.float32) -> Path:
    """Convert the checkpoint in `folder` to FP8: every matrix of a linear layer or an expert."""
    for path in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(path).items():
            if tensor.dim() == 2 and (name.endswith("proj.weight") or ".experts." in name):
                tensors[name], scales = quantise(tensor, block)
                tensors[name + suffix] = scales.to(scale_dtype)
            else:
                tensors[name] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
    _write_index(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mxfp4(folder: Path) -> Path:
    """Convert the gpt-oss checkpoint in `folder` to MXFP4, with random blocks of 32 4-bit numbers and their exponents."""
    torch.manual_seed(3)
    for path in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(path).items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, rows, cols = tensor.shape  # the order of the model; stored transposed
                tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, cols, rows // 32, 16), dtype=torch.uint8)
                tensors[f"{name}_scales"] = torch.randint(115, 130, (experts, cols, rows // 32), dtype=torch.uint8)
            else:
                tensors[name] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
    _write_index(folder)
    config = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
