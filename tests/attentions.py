"""Run flash and flex attention on a CPU without their kernels, to test the arguments that a model passes to them.

transformers derives the samples of a packed row from position ids. In a model type that does not pass them on, samples would
see each other, whatever the kernels are. So all code of transformers runs here. Only the functions of flash-attn are replaced
by plain implementations, and flex attention is not compiled.
"""

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

import torch

FLASH, FLEX = "flash_attention_2", "flex_attention"


@contextlib.contextmanager
def kernels_of(attention: str) -> Iterator[None]:
    """Replace the kernels of `attention`, so that a model runs on a CPU inside this context."""
    with contextlib.ExitStack() as stack:
        if attention == FLASH:
            stack.enter_context(mock.patch("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", _flash))
            stack.enter_context(mock.patch("transformers.integrations.flash_attention.get_target_dtype", return_value=None))
        if attention == FLEX:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def plain(query, key, value, training=False, **kwargs):
                return flex_attention(query, key, value, **kwargs)

            def uncompiled(*args, **kwargs):
                return create_block_mask(*args, **{**kwargs, "_compile": False})

            stack.enter_context(mock.patch("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain))
            stack.enter_context(mock.patch("transformers.masking_utils.create_block_mask", uncompiled))
        yield


def give(model: torch.nn.Module, attention: str) -> bool:
    """Set `attention` in a built model, even if its package is missing. Return False if the class does not support it."""
    supports = {FLASH: "_supports_flash_attn", FLEX: "_supports_flex_attn"}.get(attention)
    if supports is None:
        return True
    parts = [each for each in model.modules() if hasattr(each, supports)]
    if not all(getattr(each, supports) for each in parts):
        return False
    for config in {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values():
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = attention
    return True


def _flash(implementation, *_, **__):
    return (_whole, _varlen, None, None, None), (_arguments, None)


def _arguments(*, is_causal, softmax_scale=None, sliding_window=None, softcap=None, s_aux=None, **_):
    return {"causal": is_causal, "scale": softmax_scale, "window": sliding_window, "softcap": softcap, "sinks": s_aux}


def _whole(query, key, value, **options):
    """Attend within each row, which is one sample. Shapes: (batch, tokens, heads, width)."""
    return torch.stack([_attend(*row, **options) for row in zip(query, key, value, strict=True)])


def _varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, **options):
    """Attend within each sample of a flat batch. Shapes: (tokens, heads, width); `cu_seqlens` are the samples' boundaries."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    starts = cu_seqlens_q.tolist()
    parts = [_attend(*(each[a:b] for each in (query, key, value)), **options) for a, b in itertools.pairwise(starts)]
    return torch.cat(parts)


def _attend(query, key, value, *, causal, scale, window, softcap, sinks):
    """Compute the attention of one sample. Shapes: (tokens, heads, width)."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeat, dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))[None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window:
        hidden |= distance.abs() >= window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(query), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value)
