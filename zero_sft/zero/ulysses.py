"""Attention over sequences of which each rank of a group holds a part: DeepSpeed's Ulysses.

Before attention the ranks of a group exchange parts of the sequence for heads: each has the whole sequence of some heads. After
attention they exchange back. Everything else of a model works on a rank's own part.

DeepSpeed's class does the exchanges. It drops masks, so that tokens would see other packed samples, and tokens outside of
sliding windows. `UlyssesAttention` makes the mask of the whole sequence for attention functions that need one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF


class UlyssesAttention:
    """An attention function of transformers that exchanges parts of sequences for heads while it is `active`.

    Args:
        core: the attention function that computes.
        config: the text model's config.
        group: the ranks that share a sequence.
        takes_positions: whether `core` keeps packed samples apart by their positions, as flash attention does.
    """

    def __init__(self, core: Callable[..., Any], config: Any, group: Any, *, takes_positions: bool) -> None:
        self._core, self._config, self._group, self._takes_positions = core, config, group, takes_positions
        self._exchanges: dict[int, UlyssesSPAttentionHF] = {}
        self._own: torch.Tensor | None = None
        self._all: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self.calls = 0

    @contextlib.contextmanager
    def active(self, own: torch.Tensor, everything: torch.Tensor) -> Iterator[None]:
        """Exchange while the body runs, forward and backward.

        Args:
            own: positions of this rank's part, (rows, length / ranks).
            everything: positions of the whole sequences, (rows, length).
        """
        self._own, self._all, self._masks, self.calls = own, everything, {}, 0
        try:
            yield
        finally:
            self._own = self._all = None
            self._masks = {}

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute attention; query, key and value are (rows, heads, a part of the sequence, size of a head)."""
        if self._own is None:
            return self._core(module, query, key, value, attention_mask, *args, **kwargs)
        self.calls += 1
        kwargs["position_ids"] = self._own
        groups = getattr(module, "num_key_value_groups", None)
        try:
            exchange = self._exchange(len(query), query.shape[-1])
            return exchange(module, query, key, value, self._mask(kwargs.get("sliding_window")), *args, **kwargs)
        finally:
            if groups is not None:  # DeepSpeed sets another number where a key head is copied to several ranks
                module.num_key_value_groups = groups

    def _exchange(self, rows: int, head_size: int) -> UlyssesSPAttentionHF:
        """Return DeepSpeed's module for a number of rows."""
        if rows not in self._exchanges:
            heads = self._config.num_attention_heads
            self._exchanges[rows] = UlyssesSPAttentionHF(
                attn=self._core,
                batch_size=rows,
                attn_head_count=heads,
                attn_head_size=head_size,
                kv_head_count=getattr(self._config, "num_key_value_heads", None) or heads,
                num_hidden_layers=self._config.num_hidden_layers,
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._exchanges[rows]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """Return the mask of the whole sequences, as `visible`; None for a causal one."""
        if self._takes_positions:
            return None
        if window not in self._masks:
            assert self._all is not None
            self._masks[window] = visible(self._all, window)
        return self._masks[window]


def visible(positions: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return which tokens each token sees, (rows, 1, length, length); None if these are all before it. Pure.

    Args:
        positions: (rows, length); each 0 begins a sample.
        window: the number of tokens that a token sees at most, itself included.
    """
    length = positions.shape[1]
    samples = (positions == 0).cumsum(1)
    if bool((samples <= 1).all()) and (window is None or window >= length):
        return None
    order = torch.arange(length, device=positions.device)
    distance = order[:, None] - order[None, :]
    seen = (distance >= 0) & (samples[:, :, None] == samples[:, None, :])
    if window is not None:
        seen = seen & (distance < window)
    return seen[:, None]
