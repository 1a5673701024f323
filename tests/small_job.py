"""A small training job in a folder: a model in fp32, conversations of very different lengths, and its curve."""

import json
from pathlib import Path
from typing import Any

from tests import models
from tests.data import tiny


def make(folder: Path, samples: int, kind: str = "llama") -> Path:
    """Write a model of that kind, with a tokenizer of bytes, to `folder/model`, and the conversations to `folder/data.json`."""
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
    """One rank's part of a run that exports to `folder/out`."""
    from zero_sft import train as job

    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "constant", "bf16": False,
        "seed": 3, **arguments,
    }  # fmt: skip
    assert job.main([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 0


def history(folder: Path, out: str) -> list[dict[str, Any]]:
    """The trainer's log of a run."""
    return json.loads((folder / out / "logs" / "history.json").read_text())


def losses(folder: Path, out: str) -> list[float]:
    """The logged losses of a run's steps."""
    return [entry["loss"] for entry in history(folder, out) if "loss" in entry]
