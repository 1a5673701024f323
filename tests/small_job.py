"""Run a small training job in a folder, with an fp32 model and conversations of very different lengths."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing.runner import run_ranks
from tests import models
from tests.data import tiny


def make(folder: Path, samples: int, kind: str = "llama") -> Path:
    """Write a model with a byte tokenizer to `folder/model`, and the conversations to `folder/data.json`."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, model = tiny.byte_tokenizer(tiny.CHATML), folder / "model"
    config = models.tiny_config(
        kind, vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    talks = [
        [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i} " * (1 + 7 * i % 40)}] for i in range(samples)
    ]
    (folder / "data.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return folder


def train(folder: Path, out: str, **arguments: Any) -> None:
    """Run the job as one rank, with an export to `folder/out`. Every rank; communicates."""
    from zero_sft import train as job

    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "constant", "bf16": False,
        "seed": 3, **arguments,
    }  # fmt: skip
    assert job.main([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 0


def run(folder: Path, out: str, ranks: int, arguments: Mapping[str, Any]) -> Path:
    """Run the job on some ranks, and return its output folder."""
    run_ranks(ranks, _train, {"folder": folder, "out": out, "arguments": dict(arguments)}, 400)
    return folder / out


def _train(folder: Path, out: str, arguments: Mapping[str, Any]) -> None:
    train(folder, out, **arguments)


def history(folder: Path, out: str) -> list[dict[str, Any]]:
    """Return the trainer's log of a run."""
    return json.loads((folder / out / "logs" / "history.json").read_text())


def losses(folder: Path, out: str) -> list[float]:
    """Return the logged losses of a run's steps."""
    return [entry["loss"] for entry in history(folder, out) if "loss" in entry]
