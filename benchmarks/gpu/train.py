"""Train packed bf16 steps: `python -m benchmarks.gpu.train NAME TRAINER ATTENTION`; the trainer is `zero_sft` or `trl`.

Both train on the same rows in the same order, with the same optimizer and DeepSpeed config. `zero_sft` uses the job's loader,
arguments, trainer and collator. `trl` is a plain script: `from_pretrained` under ZeRO-3, and `SFTTrainer` with TRL's packed
batches.
"""

import sys
import time
from typing import Any

import torch

from benchmarks.gpu.settings import Settings, keep

LEARNING_RATE = 1e-4
WARM_STEPS = 5
"""Warm-up steps, which are not counted: they compile kernels and allocate memory."""


def main() -> None:
    """Train, and save losses, seconds and memory after each step."""
    name, trainer_kind, attention = sys.argv[1:]
    settings = Settings.read()
    start = time.perf_counter()
    trainer = {"zero_sft": ours, "trl": plain_trl}[trainer_kind](settings, attention)
    result: dict[str, Any] = {
        "trainer": trainer_kind, "attention": attention, "seconds": [], "losses": [],
        "tokens_a_step": settings.rows * mean_tokens(settings),
        "flops_a_token": flops_a_token(settings),
        "start_s": time.perf_counter() - start,
    }  # fmt: skip
    trainer.add_callback(_watch(name, result))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        result["allocated_before"] = torch.cuda.memory_allocated()
    trainer.train()
    result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    keep(name, result)


def ours(settings: Settings, attention: str) -> Any:
    """Create the job's trainer with a model that its loader has loaded."""
    from transformers import set_seed

    from zero_sft import load_model
    from zero_sft.arguments import build_training_arguments, parse
    from zero_sft.cluster.world import World
    from zero_sft.ds_config import load_ds_config
    from zero_sft.job.simulated_faults import SimulatedFaults
    from zero_sft.job.trainer import JobTrainer, collator_for
    from zero_sft.saving.run_record import RunRecord
    from zero_sft.zero.process_group import connect

    options = {
        "model_name_or_path": settings.folder, "output_dir": settings.folder.parent / "out", "bf16": True,
        "max_steps": settings.steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": settings.rows,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "optim": "adamw_torch_fused", "model_max_length": settings.length, "attn_implementation": attention, "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip
    parsed = parse([word for key, value in options.items() for word in (f"--{key}", str(value))])
    world = connect(World.detect())
    arguments = build_training_arguments(parsed.training, load_ds_config("zero3"))
    set_seed(arguments.seed)
    model = load_model(str(settings.folder), ds_config=arguments.hf_deepspeed_config.config, attn_implementation=attention)
    tokenizer = _tokenizer()
    return JobTrainer(
        model=model, args=arguments, faults=SimulatedFaults((), world),
        saved_tokenizer=tokenizer, record=RunRecord.of(model.config, arguments, {}), world=world, train_dataset=rows(settings),
        processing_class=tokenizer, data_collator=collator_for(model, tokenizer, None),
    )  # fmt: skip


def plain_trl(settings: Settings, attention: str) -> Any:
    """Create TRL's trainer with a model that transformers has loaded."""
    import deepspeed
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from zero_sft.ds_config import load_ds_config
    from zero_sft.zero.operators import install_operator_builder

    if not torch.cuda.is_available():
        install_operator_builder()  # a CPU rank loads an operator that was compiled there
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
    """Draw the numbers of tokens of the samples: many are short, some are as long as a row."""
    generator = torch.Generator().manual_seed(1)
    log_lengths = torch.randn(8 * settings.rows * settings.steps, generator=generator)
    return (settings.length / 6 * log_lengths.exp()).clamp(8, settings.length).int().tolist()


def rows(settings: Settings) -> Any:
    """Create packed rows of random tokens, whose frequencies a model can learn."""
    import datasets

    from zero_sft.data.packing import pack

    generator = torch.Generator().manual_seed(2)
    weights = 1.0 / torch.arange(1, settings.model["vocab_size"] + 1)
    samples: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for length in sample_lengths(settings):
        ids = torch.multinomial(weights, length, replacement=True, generator=generator).tolist()
        samples["input_ids"].append(ids)
        samples["labels"].append([-100, *ids[1:]])  # the first token has no context to be predicted from
    packed = pack(datasets.Dataset.from_dict(samples), settings.length)
    if len(packed) < settings.rows:
        raise RuntimeError(f"the samples fill {len(packed)} packed rows, but a step needs {settings.rows}")
    return packed


def mean_tokens(settings: Settings) -> float:
    """Return the mean number of tokens of a row; rows are nearly full."""
    lengths = [sum(seq_lengths) for seq_lengths in rows(settings)["seq_lengths"]]
    return sum(lengths) / len(lengths)


def flops_a_token(settings: Settings) -> float:
    """Return the FLOPs per token of a forward and a backward pass without recomputation.

    They are 6 per matrix parameter, plus causal attention inside each sample. A token attends to half of its sample's tokens on
    average, with 2 products (scores and values) of 2 operations each, and twice that in the backward pass. Source: PaLM
    (https://arxiv.org/abs/2204.02311), appendix B, halved for causality.
    """
    lengths = sample_lengths(settings)
    attended = sum(length * length for length in lengths) / sum(lengths) / 2
    sizes = settings.model
    return 6 * settings.matrix_parameters + 12 * sizes["num_hidden_layers"] * sizes["hidden_size"] * attended


def _watch(name: str, result: dict[str, Any]) -> Any:
    """Create a callback that synchronises the device after each step, and saves seconds and memory."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Called by the Trainer."""

        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                result["allocated_engine"] = torch.cuda.memory_allocated()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self._synchronize()
            result["seconds"].append(time.perf_counter() - self.start)
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
        def _synchronize() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    return Watch()


if __name__ == "__main__":
    main()
