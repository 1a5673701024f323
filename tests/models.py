"""Create tiny checkpoints of real architectures, with sizes that no world size divides, and compare with plain loading."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

# Odd widths, few heads, and vocabularies and layers that are not divisible by 2, 3 and 8.
_COMMON = {"vocab_size": 131, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}

ARCHITECTURES = {
    "llama": ("LlamaConfig", {"hidden_size": 30, "intermediate_size": 53, "num_key_value_heads": 1}),
    "qwen2": (
        "Qwen2Config",
        {"hidden_size": 30, "intermediate_size": 53, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"hidden_size": 30, "intermediate_size": 53, "num_key_value_heads": 3, "head_dim": 10}),
    "opt": ("OPTConfig", {"hidden_size": 30, "ffn_dim": 53, "word_embed_proj_dim": 18, "do_layer_norm_before": True}),
    "gpt2": ("GPT2Config", {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_size": 30, "intermediate_size": 53}),
    "gemma": ("GemmaConfig", {"hidden_size": 30, "intermediate_size": 53, "num_key_value_heads": 1, "head_dim": 10}),
    "mixtral": (
        "MixtralConfig",
        # torch's grouped matrix product needs rows of a multiple of 16 bytes.
        {"hidden_size": 24, "intermediate_size": 40, "head_dim": 10, "num_key_value_heads": 1, "num_local_experts": 5},
    ),
    "mistral": ("MistralConfig", {"hidden_size": 30, "intermediate_size": 53, "num_key_value_heads": 1, "sliding_window": 16}),
}  # fmt: skip


def tiny_config(name: str, **changes):
    """Return the config of a tiny model of architecture `name`."""
    kind, sizes = ARCHITECTURES[name]
    values = {**_COMMON, **sizes, **changes}
    if name == "gpt2":
        values = {key: value for key, value in values.items() if key not in _COMMON or key == "vocab_size"}
    return getattr(transformers, kind)(**values)


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """Save a random checkpoint in several files, in which every value differs from its neighbours and from zero."""
    shard_size = changes.pop("max_shard_size", "20KB")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def plain(folder: Path, dtype: torch.dtype, **kwargs):
    """Load the reference with plain `from_pretrained`, before ZeRO-3 is enabled."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def zero3(bf16: bool = True, **sections) -> dict:
    """Return a DeepSpeed config of stage 3."""
    return {"zero_optimization": {"stage": 3, **sections.pop("zero_optimization", {})}, "bf16": {"enabled": bf16}, **sections}


def assert_equal(model, reference, cast: torch.dtype | None = None, trainable: dict[str, bool] | None = None) -> None:
    """Assert that this rank's shard of every parameter, and every buffer, equals the reference bit for bit.

    Args:
        cast: the dtype to which the reference's floating-point parameters are cast first, as the engine does.
        trainable: the expected `requires_grad` values. Plain loading loses them: it makes every loaded parameter trainable.
    """
    from zero_sft.zero import shards

    expected = dict(reference.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    trainable = trainable or {}
    for name, param in found.items():
        want = expected[name].detach()
        if cast is not None and want.is_floating_point():
            want = want.to(cast)
        assert shards.is_sharded(param), name
        assert tuple(param.ds_shape) == tuple(want.shape), name
        assert param.dtype == want.dtype == param.ds_tensor.dtype, name
        assert param.requires_grad == trainable.get(name, expected[name].requires_grad), f"{name}: requires_grad"
        span = shards.local_range(param)
        assert torch.equal(shards.local_shard(param).cpu(), want.reshape(-1)[span.start : span.stop]), f"{name}: values"
        shards.release_shard(param)
    buffers = dict(reference.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer.cpu(), buffers[name]), name
    same_object = [(a, b) for a in found for b in found if a < b and expected[a] is expected[b]]
    assert all(found[a] is found[b] for a, b in same_object), "ties"
    assert model.training == reference.training


def gather_full(param: torch.nn.Parameter) -> torch.Tensor:
    """Return a copy of the full parameter, gathered from all ranks. Every rank; communicates."""
    from zero_sft.zero import shards

    if shards.is_gathered(param):
        return param.detach().clone()
    param.all_gather_coalesced([param]).wait()
    copy = param.detach().clone()
    param.partition(param_list=[param])
    return copy


def require_async_io() -> None:
    """Skip the test if DeepSpeed's NVMe operator can't be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio's development files are not installed")


def plain_again(folder: Path, dtype: torch.dtype):
    """Load with plain `from_pretrained` while a model is sharded."""
    from zero_sft.transformers_internals import zero3_under

    with zero3_under(None):
        return plain(folder, dtype)
