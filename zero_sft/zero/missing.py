"""What the checkpoint lacks: tied weights, buffers that are computed, parameters to be initialised.

All of it is the model's own code, run as plain `from_pretrained` runs it: what was loaded is marked, so that `_init_weights`
leaves it alone; what is missing stands there whole while `_init_weights` fills it, on every rank alike, and each rank keeps
its range. The random numbers come from a fork of torch's generator, seeded the same on every rank, so the values depend
neither on the rank nor on the world size. Nothing here communicates.
"""

# DeepSpeed hangs its state on parameters as attributes that no stub knows.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from zero_sft.zero import shards


def tied_away(tied: Mapping[str, str], loaded: Iterable[str]) -> dict[str, str]:
    """Which names get their values by tying: `{name: the name it will share}`.

    Tying is symmetric, as in plain `from_pretrained`: where the source is missing and the target is there, the source takes
    the target's. Where both were loaded nobody is tied away (they have to be compared first). Where all of a group are
    missing, the targets follow the source, which gets initialised.

    Args:
        tied: `{target: source}`.
        loaded: names that the checkpoint fills.
    """
    loaded = set(loaded)
    away: dict[str, str] = {}
    for target, source in tied.items():
        if target in loaded:
            if source not in loaded and source not in away:
                away[source] = target
        else:
            away[target] = away.get(source, source)
    return away


def initialise(
    model: PreTrainedModel,
    filled: Iterable[str],
    params: Mapping[str, torch.nn.Parameter],
    *,
    device: torch.device,
    seed: int,
) -> None:
    """Compute the buffers and initialise the missing parameters. Every rank.

    Args:
        filled: names (of parameters and buffers) that hold the checkpoint's values, or will by tying.
        params: parameters to initialise, by name.
        device: where buffers live.
        seed: the same on every rank.
    """
    for name in filled:
        model.get_parameter_or_buffer(name)._is_hf_initialized = True
    _give_buffers_memory(model, device)
    unique = {id(param): name for name, param in params.items()}
    once = {name: params[name] for name in unique.values()}
    for param in once.values():
        shards.expand(param)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        model.initialize_weights()

    def fold(memory: Mapping[str, torch.Tensor]) -> None:
        for name, shard in memory.items():
            shards.fold(once[name], shard)

    shards.fill_shards(once, fold)


def _give_buffers_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Replace buffers that are still on the meta device by uninitialised ones, for `_init_weights` to fill."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
