"""Folders of published models, from the load over a short training to an export that plain transformers opens and that stops.

Each model learns one answer by heart. Its export must give that answer in plain transformers, with the export's own chat
template and generation config, and stop there; transformers 4 must find the same ids, answer and logits.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.published import models, reader
from tests.saving.test_older_readers import OLDER

READER = str(Path(reader.__file__))

QUESTION, ANSWER = "What is the capital of France?", "Paris, of course."
STEPS = 40
LEARNS_SLOWLY = {"gpt-oss-20b": {"learning_rate": 0.02, "max_steps": 50, "lr_scheduler_type": "cosine", "warmup_steps": 5}}


@pytest.fixture
def folder(request, tmp_path):
    """The model's folder, with the conversations next to it."""
    models.write(request.param, tmp_path / request.param)
    talk = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": str(number), "conversations": talk} for number in range(8)]))
    return tmp_path / request.param


def train_and_export(folder):
    """One rank's part of the job."""
    from zero_sft import train

    name = folder.name
    arguments = {
        "model_name_or_path": folder, "data_path": folder.parent / "data.json", "output_dir": folder.parent / "out",
        "max_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 10,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "bf16": False, "seed": 3, "packing": False,
        "activation_checkpointing": False, **LEARNS_SLOWLY.get(name, {}),
    }  # fmt: skip
    if models.MODELS[name].trained_template:
        arguments["chat_template"] = models.MODELS[name].trained_template
    assert train.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))]) == 0


def read_back(folder, python=sys.executable, before=None):
    """What plain transformers makes of the exported files, in a process without ZeRO-3."""
    command = [python, READER, *(["--before", before] if before else []), QUESTION, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:]}


def _prompts_otherwise(name):
    """Whether the generation prompt is not what stands before the answer in training: DeepSeek-R1's opens a thought, and in
    training gpt-oss has the answer's channel after it."""
    template = models.MODELS[name].template or ""
    return "deepseek_r1" in template or "gptoss" in template


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=400)
@pytest.mark.parametrize("folder", models.MODELS, indirect=True)
def test_trained_exported_answers_and_stops(folder):
    import torch.distributed as dist

    train_and_export(folder)
    if dist.get_rank() == 0:
        before = ANSWER if _prompts_otherwise(folder.name) else None
        found = read_back(folder.parent / "out", before=before)
        assert "error" not in found, found
        assert found["answer"].endswith(ANSWER), found["answer"]
        assert found["stopped"]
        if OLDER.exists():  # `make older-readers` makes it
            assert read_back(folder.parent / "out", str(OLDER), before) == found
    dist.barrier()
