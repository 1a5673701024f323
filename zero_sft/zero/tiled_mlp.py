"""Compute the MLPs of a model in tiles of tokens (`--tiled_mlp`): their inner activations exist for one tile at a time.

DeepSpeed's `TiledMLP` computes the tiles, again in the backward pass. An MLP becomes a leaf module of ZeRO-3, whose parameters
are gathered once for all tiles. So ranks whose batches have other lengths, and other numbers of tiles, gather alike.
"""

from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from zero_sft.errors import ArgumentError

_PROJECTIONS = ("up_proj", "down_proj")


def tile_mlps(model: Any, tokens: int) -> int:
    """Let the MLPs of a model compute at most `tokens` tokens at a time; return the number of MLPs. Before the engine starts.

    Raises:
        ArgumentError: the model has no such MLP.
    """
    found = 0
    for module in list(model.modules()):
        if is_mlp(module):
            _tile(module, tokens)
            found += 1
    if not found:
        raise ArgumentError(
            f"--tiled_mlp can't be used: {model.config.model_type} has no MLP with up_proj and down_proj. Leave it out.",
            code="arguments.no_mlp",
        )
    return found


def is_mlp(module: nn.Module) -> bool:
    """Return whether a module is an MLP that computes each token for itself."""
    return type(module).__name__.endswith("MLP") and all(hasattr(module, name) for name in _PROJECTIONS)


def _tile(module: nn.Module, tokens: int) -> None:
    whole = type(module).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        tiles = tile_count(x.numel() // x.shape[-1], tokens)
        if tiles == 1:
            return whole(module, x)
        flat = x.reshape(-1, x.shape[-1])
        return TiledMLP.apply(whole, module, flat, tiles, list(module.parameters())).view_as(x)

    module.forward = forward
    set_z3_leaf_module(module, True)


def tile_count(total: int, tokens: int) -> int:
    """Return a number of tiles that `torch.chunk` makes exactly: DeepSpeed drops gradients if it makes fewer. Pure.

    Worked example: 10 tokens, at most 3 at a time: 4 tiles of 3, 3, 3 and 1. 10 tokens in 7 tiles would be 5 tiles of 2.
    """
    size = -(-total // max(1, -(-total // tokens)))
    return max(1, -(-total // size)) if total else 1
