"""Train every mixture of experts of transformers while most experts are idle, and compare with training it unsharded.

Each rank sees one token many times, so that it uses few experts and not those of the other rank. Ranks whose modules run in
different orders would wait for each other's gathers forever.
"""

import copy
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from testing.runner import run_ranks
from tests import architectures, models
from zero_sft.job.device_use import has_idle_experts
from zero_sft.rope import text_config
from zero_sft.transformers_internals import zero3_under

STEPS, LR = 2, 0.01
FEWER_STEPS = {"doge": 1}
"""doge chooses a few of many experts by products of keys: after a step, rounding chooses others."""
BATCH = 16
"""Types that are trained by the same ranks."""


def types() -> list[str]:
    """Return the types that have experts of which a token uses a part."""
    buildable = [each for each in architectures.CAUSAL_TYPES if each not in architectures.NOT_BUILDABLE]
    return [each for each in buildable if has_idle_experts(text_config(architectures.tiny_config(each)))]


def save(model_type: str, folder: Path) -> Path:
    """Save a tiny model with the values of its class's initialisation, so that rounding stays small."""
    torch.manual_seed(9)
    config = architectures.tiny_config(model_type)
    if model_type == "deepseek_v2":
        config.qk_nope_head_dim, config.kv_lora_rank = 4, 8  # its rotary embedding takes no odd strides
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def outcomes(names: Sequence[str], folder: Path, ranks: int = 2) -> dict[str, str]:
    """Train the types, and return what came of each: "equal", or an error. In the parent of the ranks."""
    results = {}
    for start in range(0, len(names), BATCH):
        batch = {name: str(save(name, folder / name)) for name in names[start : start + BATCH]}
        try:
            run_ranks(ranks, train_all, {"folders": batch, "results": str(folder)}, 20.0 * len(batch) + 60)
        except AssertionError as error:
            results |= dict.fromkeys(batch, f"the ranks of its batch ended: {error}")
        for name in batch:
            if (path := folder / f"{name}.json").exists():
                results[name] = json.loads(path.read_text())
    return results


def tokens(rank: int, step: int) -> torch.Tensor:
    """A batch of one token, another on each rank."""
    return torch.full((1, 8), 5 + 11 * rank + 3 * step)


def with_a_loop(model: Any) -> None:
    """Compute experts one after the other, and idle ones not at all: grouped products don't take such small sizes."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def train_all(folders: dict[str, str], results: str) -> None:
    """Train each model; rank 0 writes what came of each to a file. Every rank; communicates."""
    for model_type, folder in folders.items():
        result = "equal"
        try:
            train(Path(folder))
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result)
        if dist.get_rank() == 0:
            worst = max(gathered, key=lambda text: (text != "equal", text))
            (Path(results) / f"{model_type}.json").write_text(json.dumps(worst))


def train(folder: Path) -> None:
    """Take some steps, and compare them with the same on one process. Every rank; communicates."""
    import deepspeed

    from zero_sft import load_model

    ds = models.zero3(
        bf16=False, train_micro_batch_size_per_gpu=1, optimizer={"type": "SGD", "params": {"lr": LR}},
        zero_allow_untested_optimizer=True, gradient_clipping=0.0,
    )  # fmt: skip
    with zero3_under(None):
        plain = models.plain(folder, torch.float32).eval()
    with_a_loop(plain)
    count = FEWER_STEPS.get(plain.config.model_type, STEPS)
    initial = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for step in range(count):
        for rank in range(dist.get_world_size()):
            ids = tokens(rank, step)
            (plain(input_ids=ids, labels=ids, use_cache=False).loss / dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model: Any = load_model(str(folder), ds_config=ds, dtype=torch.float32)
    with_a_loop(model)
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=list(model.parameters()))
    engine.eval()
    for step in range(count):
        ids = tokens(dist.get_rank(), step)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    furthest = 0.0
    expected = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        value, plain_value = models.gather_full(param), expected[name].detach()
        moved = float((plain_value - initial[name]).abs().max())
        error = float((value - plain_value).abs().max())
        assert error <= 1e-2 * moved + 1e-5, (name, error, moved)
        furthest = max(furthest, moved)
    assert furthest > 1e-4
    engine.destroy()
    gc.collect()
