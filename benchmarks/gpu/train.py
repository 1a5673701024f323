"""Packed bf16 steps: `python -m benchmarks.gpu.train NAME TRAINER ATTENTION`; the trainer is `zero_sft` or `trl`.

Both get the same rows in the same order, the same optimizer and DeepSpeed config. `zero_sft` is the job's own way: its loader,
arguments, trainer and collator. `trl` is a plain script: `from_pretrained` under ZeRO-3 and `SFTTrainer` with its own packed
batches.
"""

import sys
import time
from typing import Any

import torch

from benchmarks.gpu.settings import Settings, keep

LEARNING_RATE = 1e-4
WARM_STEPS = 5
"""Steps that don't count: kernels are compiled and memory is found in them."""


def main() -> None:
    """Train, and keep losses, seconds and memory after each step."""
    name, trainer_kind, attention = sys.argv[1:]
    settings = Settings.read()
    begun = time.perf_counter()
    trainer = {"zero_sft": ours, "trl": plain_trl}[trainer_kind](settings, attention)
    result: dict[str, Any] = {
        "trainer": trainer_kind, "attention": attention, "seconds": [], "losses": [],
        "tokens_a_step": settings.rows * mean_tokens(settings),
        "flops_a_token": flops_a_token(settings),
        "start_s": time.perf_counter() - begun,
    }  # fmt: skip
    trainer.add_callback(_watch(name, result))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        result["allocated_before"] = torch.cuda.memory_allocated()
    trainer.train()
    result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    keep(name, result)


def ours(settings: Settings, attention: str) -> Any:
    """The job's trainer over a model that its loader has loaded."""
    from transformers import set_seed

    from zero_sft import load_model
    from zero_sft.arguments import build_training_arguments, parse
    from zero_sft.cluster.world import World
    from zero_sft.ds_config import load_ds_config
    from zero_sft.job.checkpoints import PublishedModel
    from zero_sft.job.trainer import Trainer, collator_for
    from zero_sft.zero.process_group import connect

    given = {
        "model_name_or_path": settings.folder, "output_dir": settings.folder.parent / "out", "bf16": True,
        "max_steps": settings.steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": settings.rows,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "optim": "adamw_torch_fused", "model_max_length": settings.length, "attn_implementation": attention, "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip
    parsed = parse([word for key, value in given.items() for word in (f"--{key}", str(value))])
    connect(World.detect())
    arguments = build_training_arguments(parsed.training, load_ds_config("zero3"))
    set_seed(arguments.seed)
    model = load_model(str(settings.folder), ds_config=arguments.hf_deepspeed_config.config, attn_implementation=attention)
    tokenizer = _tokenizer()
    return Trainer(
        model=model, args=arguments, published=PublishedModel(tokenizer=tokenizer, config_values={}),
        train_dataset=rows(settings),
        processing_class=tokenizer, data_collator=collator_for(model, tokenizer, None),
    )  # fmt: skip


def plain_trl(settings: Settings, attention: str) -> Any:
    """TRL's own trainer over a model that transformers has loaded."""
    import deepspeed
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from zero_sft.ds_config import load_ds_config
    from zero_sft.zero.operators import keep_operators_apart

    if not torch.cuda.is_available():
        keep_operators_apart()  # a CPU rank loads one, which was compiled there
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    arguments = SFTConfig(
        output_dir=str(settings.folder.parent / "out"), bf16=True, max_steps=settings.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.rows, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", optim="adamw_torch_fused", max_length=settings.length, packing=True, packing_strategy="bfd",
        dataset_kwargs={"skip_prepare_dataset": True}, deepspeed=load_ds_config("zero3"), seed=3, report_to="none",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), activation_checkpointing=True,
    )  # fmt: skip
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=torch.bfloat16, attn_implementation=attention)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows(settings), processing_class=_tokenizer())


def _tokenizer() -> Any:
    from tests.data.tiny import byte_tokenizer

    return byte_tokenizer()


def sample_lengths(settings: Settings) -> list[int]:
    """Tokens of the samples: many short ones, some as long as a row."""
    chance = torch.Generator().manual_seed(1)
    spread = torch.randn(8 * settings.rows * settings.steps, generator=chance)
    return (settings.length / 6 * spread.exp()).clamp(8, settings.length).int().tolist()


def rows(settings: Settings) -> Any:
    """Packed rows of random tokens, whose frequencies are there to be learnt."""
    import datasets

    from zero_sft.data.packing import pack

    chance = torch.Generator().manual_seed(2)
    weights = 1.0 / torch.arange(1, settings.model["vocab_size"] + 1)
    samples: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for length in sample_lengths(settings):
        ids = torch.multinomial(weights, length, replacement=True, generator=chance).tolist()
        samples["input_ids"].append(ids)
        samples["labels"].append([-100, *ids[1:]])  # a sample's first token follows from nothing
    packed = pack(datasets.Dataset.from_dict(samples), settings.length)
    if len(packed) < settings.rows:
        raise RuntimeError(f"{len(packed)} packed rows, and a step takes {settings.rows}")
    return packed


def mean_tokens(settings: Settings) -> float:
    """Tokens of a row; rows are nearly full."""
    lengths = [sum(each) for each in rows(settings)["seq_lengths"]]
    return sum(lengths) / len(lengths)


def flops_a_token(settings: Settings) -> float:
    """Of a forward and a backward pass without recomputation: 6 a matrix parameter, and causal attention inside each sample.

    Attention: a token meets half of its sample's tokens on average; scores and values, 2 products of 2 operations each, and
    twice that backward. Source: PaLM (https://arxiv.org/abs/2204.02311), appendix B, halved for causality.
    """
    lengths = sample_lengths(settings)
    met = sum(n * n for n in lengths) / sum(lengths) / 2
    of = settings.model
    return 6 * settings.matrix_parameters + 12 * of["num_hidden_layers"] * of["hidden_size"] * met


def _watch(name: str, result: dict[str, Any]) -> Any:
    """A callback that waits for the device after each step, and keeps seconds and memory."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Called by the Trainer."""

        begun = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                result["allocated_engine"] = torch.cuda.memory_allocated()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._wait()
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self._wait()
            result["seconds"].append(time.perf_counter() - self.begun)
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                result["peak_allocated"] = torch.cuda.max_memory_allocated()
                result["peak_reserved"] = torch.cuda.max_memory_reserved()
                result["device_used"] = total - free
            keep(name, result)

        def on_log(self, args: Any, state: Any, *_: Any, logs: dict | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                result["losses"].append(float(logs["loss"]))
                keep(name, result)

        @staticmethod
        def _wait() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    return Watch()


if __name__ == "__main__":
    main()
