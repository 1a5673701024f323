"""Create the benchmark's checkpoints once, with random weights, and keep them in a cache folder for later runs."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA = "LlamaConfig"
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.1B": (LLAMA, {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                     "num_key_value_heads": 4}),
    "0.4B": (LLAMA, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16,
                     "num_key_value_heads": 8}),
    "3B": (LLAMA, {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                   "num_key_value_heads": 8}),
    "1.2B MoE": ("MixtralConfig", {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 12,
                                   "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8}),
    "tiny": (LLAMA, {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 4}),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's model size, stored dtype and maximum file size."""

    size: str
    dtype: str = "bfloat16"
    max_file: str = "50GB"

    @property
    def title(self) -> str:
        """The name of the model in headings."""
        kind = "Mixtral" if SIZES[self.size][0] != LLAMA else "Llama"
        return f"{kind} {self.size} in {self.dtype}"

    def make(self, cache: Path) -> Path:
        """Return the folder with config and weights (no tokenizer), and create it if it does not exist."""
        folder = cache / "-".join([self.size.replace(" ", "_"), self.dtype, self.max_file])
        if (folder / "complete").exists():
            return folder
        import torch
        import transformers

        shutil.rmtree(folder, ignore_errors=True)
        kind, sizes = SIZES[self.size]
        dtype = getattr(torch, self.dtype)
        config = getattr(transformers, kind)(vocab_size=32000, max_position_embeddings=2048, **sizes, dtype=self.dtype)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for param in model.parameters():
            param.data.normal_(0, 0.02, generator=generator)
        model.save_pretrained(folder, max_shard_size=self.max_file)
        (folder / "complete").touch()
        return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files, in order."""
    return sorted(folder.glob("*.safetensors"))
