"""The sizes of a run, and the folder through which the parts share their results."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIZES: dict[str, dict[str, int]] = {
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The sizes of a run. `length`: tokens of a packed row; `rows`: the packed rows of a step, each a micro-batch."""

    work: str
    size: str = "3B"
    length: int = 4096
    rows: int = 2
    steps: int = 20
    rounds: int = 5
    dry_run: bool = False

    @property
    def model(self) -> Mapping[str, int]:
        """The sizes of the Llama model, with the names of its config."""
        return _SIZES[self.size]

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return Path(self.work) / f"llama-{self.size}"

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model: embeddings, layers, head."""
        return self.matrix_parameters + self.model["vocab_size"] * self.model["hidden_size"]

    @property
    def matrix_parameters(self) -> int:
        """The number of parameters that each token is multiplied with, without the embedding, which is a lookup."""
        sizes = self.model
        width, head_dim = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
        attention = 2 * width * width + 2 * width * sizes["num_key_value_heads"] * head_dim
        return sizes["num_hidden_layers"] * (attention + 3 * width * sizes["intermediate_size"]) + width * sizes["vocab_size"]

    @classmethod
    def read(cls) -> "Settings":
        """Read the settings in the process of a part."""
        return cls(**json.loads((Path(os.environ["ZERO_SFT_BENCH_WORK"]) / "settings.json").read_text()))

    def write(self) -> None:
        """Write the settings for the processes of the parts."""
        (Path(self.work) / "settings.json").write_text(json.dumps(dataclasses.asdict(self)))


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Save the results of a part so far, so that they remain if the part is ended."""
    path = Path(os.environ["ZERO_SFT_BENCH_WORK"]) / f"{name}.json"
    incomplete = path.with_suffix(".part")
    incomplete.write_text(json.dumps(result))
    incomplete.replace(path)
