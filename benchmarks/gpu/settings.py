"""How large the parts are, and the folder through which they pass results on."""

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
    """Sizes of a run. `length`: tokens of a packed row; a step takes `rows` of them, one at a time."""

    work: str
    size: str = "3B"
    length: int = 4096
    rows: int = 2
    steps: int = 20
    rounds: int = 5
    dry_run: bool = False

    @property
    def model(self) -> Mapping[str, int]:
        """The Llama's sizes, by the names of its config."""
        return _SIZES[self.size]

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return Path(self.work) / f"llama-{self.size}"

    @property
    def parameters(self) -> int:
        """Of the whole model: embeddings, layers, head."""
        return self.matrix_parameters + self.model["vocab_size"] * self.model["hidden_size"]

    @property
    def matrix_parameters(self) -> int:
        """Those that each token is multiplied with; the embedding is looked up."""
        of = self.model
        width, head = of["hidden_size"], of["hidden_size"] // of["num_attention_heads"]
        attention = 2 * width * width + 2 * width * of["num_key_value_heads"] * head
        return of["num_hidden_layers"] * (attention + 3 * width * of["intermediate_size"]) + width * of["vocab_size"]

    @classmethod
    def read(cls) -> "Settings":
        """The settings of the part that runs as this process."""
        return cls(**json.loads((Path(os.environ["ZERO_SFT_BENCH_WORK"]) / "settings.json").read_text()))

    def write(self) -> None:
        """For the parts."""
        (Path(self.work) / "settings.json").write_text(json.dumps(dataclasses.asdict(self)))


def keep(name: str, result: Mapping[str, Any]) -> None:
    """What a part has found so far. A part that is ended later has kept it."""
    path = Path(os.environ["ZERO_SFT_BENCH_WORK"]) / f"{name}.json"
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result))
    draft.replace(path)
