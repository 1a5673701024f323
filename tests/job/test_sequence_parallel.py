"""Ranks that share sequences train as ranks that do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import small_job
from tests.errors import raises
from tests.slow import slow
from zero_sft.job.sequence_parallel import DataRank, own_part, require_shareable
from zero_sft.zero.ulysses import visible

GIVEN = {
    "per_device_train_batch_size": 2, "max_steps": 4, "packing": False, "optim": "sgd", "learning_rate": 0.1,
    "max_grad_norm": 0.0,
}  # fmt: skip


def run(folder: Path, out: str, ranks: int, parts: int, **arguments) -> Path:
    return small_job.run(folder, out, ranks, GIVEN | {"sequence_parallel_size": parts} | arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_job.make(tmp_path_factory.mktemp("sequences"), 24)


@pytest.mark.parametrize(
    ("ranks", "parts", "arguments"),
    [
        slow(2, 2, {}),
        slow(4, 4, {}),
        slow(4, 2, {"per_device_train_batch_size": 1}),
        (2, 2, {"packing": True, "per_device_train_batch_size": 1, "max_steps": 3, "model_max_length": 128}),
        slow(2, 2, {"activation_checkpointing": False, "gradient_accumulation_steps": 2}),
        slow(2, 2, {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}),
    ],
)
def test_as_unshared(folder, ranks, parts, arguments):
    """Losses and weights, to rounding."""
    one, shared = (f"{name}-{ranks}-{parts}-{'-'.join(arguments)}" for name in ("one", "shared"))
    plain = run(folder, one, ranks // parts, 1, **arguments)
    run(folder, shared, ranks, parts, **arguments)
    assert small_job.losses(folder, shared) == pytest.approx(small_job.losses(folder, one), rel=1e-5)
    name = "adapter_model.safetensors" if "lora_r" in arguments else "model.safetensors"
    expected, found = load_file(plain / name), load_file(folder / shared / name)
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sliding_windows(tmp_path):
    """Attention that takes no positions needs the mask of the whole sequence."""
    folder = small_job.make(tmp_path, 24, "mistral")
    run(folder, "one", 1, 1)
    run(folder, "shared", 2, 2)
    assert small_job.losses(folder, "shared") == pytest.approx(small_job.losses(folder, "one"), rel=1e-5)


@pytest.mark.slow
def test_evaluation_and_answers(folder):
    """The same loss; the samples fill no batch. Prompts are answered outside of shared steps."""
    prompts = folder / "prompts.json"
    prompts.write_text('["Hello?"]')
    given = {
        "eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5,
        "sample_prompts": prompts,
    }  # fmt: skip
    run(folder, "eval-one", 1, 1, **given)
    run(folder, "eval-shared", 2, 2, **given)
    one, shared = (
        [entry["eval_loss"] for entry in small_job.history(folder, name) if "eval_loss" in entry]
        for name in ("eval-one", "eval-shared")
    )
    assert len(one) >= 2
    assert shared == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_the_end_is_that_of_the_uninterrupted_run(folder):
    """Bit for bit; and to rounding where the ranks share nothing any more."""
    saves = {"save_strategy": "steps", "save_steps": 2, "checkpoint_format": "sharded", "optim": "adamw_torch"}
    whole = run(folder, "whole", 2, 2, **saves)
    run(folder, "again", 2, 2, resume_from_checkpoint=whole / "checkpoint-2", **saves)
    assert small_job.losses(folder, "again") == small_job.losses(folder, "whole")
    run(folder, "alone", 1, 1, resume_from_checkpoint=whole / "checkpoint-2", **saves)
    assert small_job.losses(folder, "alone") == pytest.approx(small_job.losses(folder, "whole"), rel=1e-4)


def config(**values):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, **values}
    )


@pytest.mark.parametrize(
    ("settings", "attention", "size", "ranks", "value"),
    [
        (config(), None, 4, 6, "number of ranks, 6"),
        (config(num_attention_heads=6, num_key_value_heads=6), None, 4, 8, "heads (6)"),
        (config(num_attention_heads=12, num_key_value_heads=3), None, 2, 8, "of keys (3)"),
        (config(), "eager", 2, 8, "eager"),
        (config(kv_lora_rank=8), None, 2, 8, "latent"),
        (config(layer_types=["linear_attention", "full_attention"]), None, 2, 8, "linear_attention"),
    ],
)
def test_models_that_can_not_be_shared(settings, attention, size, ranks, value):
    from transformers import LlamaForCausalLM

    with raises("arguments.sequence_parallel", value):
        require_shareable(settings, LlamaForCausalLM, attention, size, ranks)


def test_the_part_of_a_rank():
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, 7, 8]])}
    parts = [own_part(batch, DataRank.of(rank, 4, 2)) for rank in (2, 3)]
    assert [part["input_ids"].tolist() for part in parts] == [[[5, 6]], [[7, 8]]]
    assert [part["shift_labels"].tolist() for part in parts] == [[[6, 7]], [[8, -100]]]
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1]], [[2, 3]]]


def test_what_a_token_sees():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert visible(torch.arange(5)[None], None) is None
    seen = visible(packed, None)
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(packed, 2)[0, 0, 2].tolist() == [False, True, True, False, False]


@pytest.mark.slow
def test_noise_is_for_training_alone(folder):
    """NEFTune, on parameters that are sharded: losses of steps change, and those of evaluations do not."""
    given = {"eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-9}
    run(folder, "calm", 2, 1, **given)
    run(folder, "noisy", 2, 1, neftune_noise_alpha=5.0, **given)
    assert small_job.losses(folder, "noisy") != pytest.approx(small_job.losses(folder, "calm"), rel=1e-4)
    calm, noisy = (
        [row["eval_loss"] for row in small_job.history(folder, name) if "eval_loss" in row] for name in ("calm", "noisy")
    )
    assert noisy == pytest.approx(calm, rel=1e-5)
