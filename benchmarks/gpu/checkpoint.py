"""Create the checkpoint: random weights, generated on the device if there is one, and written file by file."""

import json
import time

import torch
from safetensors.torch import save_file

from benchmarks.gpu.settings import Settings, keep

FILE_BYTES = 2**31


def main() -> None:
    """Write the config, the weights and their index."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = Settings.read()
    start = time.perf_counter()
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**settings.model, dtype="bfloat16", tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{}]
    total = 0
    weight_map = {}
    for name, meta in state.items():
        if sum(tensor.nbytes for tensor in files[-1].values()) + meta.nbytes > FILE_BYTES and files[-1]:
            _write(folder, len(files), files[-1])
            files[-1].clear()
            files.append({})
        is_norm = meta.dim() == 1
        tensor = torch.ones(meta.shape) if is_norm else torch.empty(meta.shape, device=device).normal_(0, 0.02)
        files[-1][name] = tensor.to(torch.bfloat16).cpu()
        weight_map[name] = _name(len(files))
        total += files[-1][name].nbytes
    _write(folder, len(files), files[-1])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    keep("checkpoint", {"bytes": total, "files": len(files), "seconds": time.perf_counter() - start})


def _name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write(folder, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / _name(number), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
