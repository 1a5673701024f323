"""MLPs in tiles train as whole ones, and need less memory."""

import pytest
import torch
from safetensors.torch import load_file

from tests import models, small_job
from tests.errors import raises
from tests.job.test_sequence_parallel import run
from tests.slow import slow
from zero_sft.estimate.activations import LiveMemory
from zero_sft.zero.tiled_mlp import tile_count, tile_mlps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_job.make(tmp_path_factory.mktemp("tiles"), 24)


@pytest.mark.parametrize(
    ("tokens", "arguments"),
    [
        (13, {}),
        slow(13, {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}),
        slow(13, {"activation_checkpointing": False, "gradient_accumulation_steps": 2}),
        slow(100, {"sequence_parallel_size": 2}),
        slow(7, {"unfreeze": r"layers\.1\.mlp\.down_proj"}),
    ],
)
def test_as_whole_mlps(folder, tokens, arguments):
    """Batches of different lengths on the ranks, so different numbers of tiles."""
    one, tiled = (f"{name}-{tokens}-{'-'.join(arguments)}" for name in ("whole", "tiled"))
    given = {"parts": arguments.get("sequence_parallel_size", 1), **arguments}
    given.pop("sequence_parallel_size", None)
    plain = run(folder, one, 2, **given)
    run(folder, tiled, 2, tiled_mlp=tokens, **given)
    assert small_job.losses(folder, tiled) == pytest.approx(small_job.losses(folder, one), rel=1e-5)
    name = "adapter_model.safetensors" if "lora_r" in arguments else "model.safetensors"
    expected, found = load_file(plain / name), load_file(folder / tiled / name)
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-4, atol=1e-5)


def peak_bytes(model) -> int:
    live = LiveMemory()
    for tensor in (*model.parameters(), *model.buffers()):
        live.leave_out(tensor)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    ids = torch.arange(512).view(1, -1) % 131
    with live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return live.peak


def test_memory_of_a_long_row():
    """An MLP that is eight times as wide as its input decides the peak."""
    from transformers import AutoModelForCausalLM

    config = models.tiny_config(
        "llama", hidden_size=32, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole = peak_bytes(model)
    assert tile_mlps(model, 64) == 2
    assert peak_bytes(model) < 0.4 * whole


@pytest.mark.parametrize(("total", "tokens", "count"), [(10, 3, 4), (10, 10, 1), (10, 100, 1), (9, 2, 5), (7, 1, 7), (0, 4, 1)])
def test_tiles_are_as_many_as_torch_makes(total, tokens, count):
    assert tile_count(total, tokens) == count
    if total:
        assert len(torch.chunk(torch.zeros(total), count)) == count


def test_a_model_without_such_mlps():
    from transformers import AutoModelForCausalLM

    with raises("arguments.no_mlp", "gpt2"):
        tile_mlps(AutoModelForCausalLM.from_config(models.tiny_config("gpt2")), 8)
