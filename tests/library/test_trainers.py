"""Trainers of other libraries, and plain loops, take a sharded model, and learn what they learn after a stock load."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import models, small_job
from tests.slow import slow_except

LR = 0.05
STEPS = 3


def make(folder: Path) -> Path:
    """Write a model, its tokenizer, and the same model with another head to a folder."""
    small_job.make(folder, 8)
    config = AutoModelForCausalLM.from_pretrained(folder / "model").config
    config.num_labels, config.pad_token_id = 1, tokenizer_of(folder).pad_token_id
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("trainers"))


def config(**sections) -> dict:
    return models.zero3(
        bf16=False, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.0,
        zero_allow_untested_optimizer=True, **sections,
    )  # fmt: skip


def loaded(folder: Path, loader: str, ds: dict, name: str = "model", **options):
    from zero_sft import load_model

    return load_model(str(folder / name), ds_config=ds, dtype=torch.float32, loader=loader, **options)


def values(model) -> dict[str, torch.Tensor]:
    """Every rank; communicates."""
    model = getattr(model, "module", model)
    return {name: models.gather_full(param) for name, param in model.named_parameters()}


def rows(step: int) -> torch.Tensor:
    return (torch.arange(3, 15).view(1, -1) + step + 7 * dist.get_rank()) % 131


def accelerated(folder, loader, out):
    """Accelerate's `prepare`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    ds = config()
    model = loaded(folder, loader, ds)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    model.train()
    for step in range(STEPS):
        accelerator.backward(model(input_ids=rows(step), labels=rows(step)).loss)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def plain_loop(folder, loader, out):
    """`deepspeed.initialize` and an optimizer of torch."""
    import deepspeed

    ds = config()
    model = loaded(folder, loader, ds)
    model.train()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=ds)
    for step in range(STEPS):
        engine.backward(engine(input_ids=rows(step), labels=rows(step)).loss)
        engine.step()
    return values(engine)


def arguments(out: Path, ds: dict, **given) -> dict:
    return {
        "output_dir": str(out / "run"), "deepspeed": ds, "per_device_train_batch_size": 1, "max_steps": STEPS, "bf16": False,
        "learning_rate": LR, "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "max_grad_norm": 0.0, "seed": 3, "use_cpu": True, **given,
    }  # fmt: skip


def trainer(folder, loader, out):
    """transformers' Trainer."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    ds = config()
    data = Dataset.from_list([{"input_ids": list(range(number, number + 12))} for number in range(3, 19)])
    data = data.map(lambda row: {"labels": row["input_ids"]})
    args = TrainingArguments(**arguments(out, ds, gradient_checkpointing=False))
    own = Trainer(model=loaded(folder, loader, ds), args=args, train_dataset=data)
    own.train()
    return values(own.model_wrapped)


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def preferences():
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": f"{n} plus", "chosen": f" {n} is {2 * n}", "rejected": f" nothing {n}"} for n in range(8)]
    )


def dpo(folder, loader, out):
    """TRL's DPO, with a sharded reference model."""
    from trl import DPOConfig, DPOTrainer

    ds = config()
    policy, reference = loaded(folder, loader, ds), loaded(folder, loader, ds)
    args = DPOConfig(**arguments(out, ds, gradient_checkpointing=False))
    own = DPOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=preferences(), processing_class=tokenizer_of(folder)
    )
    own.train()
    assert own.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: both models are still the same
    return values(own.model_wrapped)


def reward(folder, loader, out):
    """TRL's reward trainer, on another head."""
    from trl import RewardConfig, RewardTrainer

    ds = config()
    model = loaded(folder, loader, ds, "reward", model_class=AutoModelForSequenceClassification)
    args = RewardConfig(**arguments(out, ds, gradient_checkpointing=False))
    own = RewardTrainer(model=model, args=args, train_dataset=preferences(), processing_class=tokenizer_of(folder))
    own.train()
    return values(own.model_wrapped)


def train(folder: Path, run, out: Path) -> None:
    from zero_sft.transformers_internals import zero3_under

    ours = run(folder, "sharded", out)
    with zero3_under(None):
        initial = dict(models.plain(folder / "model", torch.float32).named_parameters())
    theirs = run(folder, "stock", out)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert any(not torch.equal(value, initial[name]) for name, value in ours.items() if name in initial)


TRAINERS = {
    "a loop with `deepspeed.initialize`": plain_loop, "accelerate's `prepare`": accelerated, "transformers' `Trainer`": trainer,
    "TRL's `DPOTrainer` with a sharded reference model": dpo,
    "TRL's `RewardTrainer`, with the head for classification": reward,
}  # fmt: skip


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", slow_except([list(TRAINERS)[1]], TRAINERS))
def test_as_after_a_stock_load(folder, tmp_path, name):
    train(folder, TRAINERS[name], tmp_path)
