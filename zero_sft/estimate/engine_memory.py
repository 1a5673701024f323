"""Memory of ZeRO-3 training: what DeepSpeed's engine holds on a device and on its host, and what a step takes besides.

Sources: the allocations of DeepSpeed 0.19's stage 3 optimizer, whose published estimators
(https://deepspeed.readthedocs.io/en/stable/memory.html) count the model's states as here, and nothing of what a step takes;
ZeRO (https://arxiv.org/abs/1910.02054), section 3. torch rounds every page-locked block up to a power of two
(`CachingHostAllocator`). Left out: fragmentation of the device's allocator, hpZ's second copy, and that the Trainer cuts
sub-groups apart for parameters with and without weight decay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from zero_sft.plan.partition import partition_numel

MOMENT_BYTES = 8
"""Adam's two moments, fp32 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The model, as the engine sees it: elements of each parameter, bytes of one, and of the activations of a pass."""

    numels: Sequence[int]
    itemsize: int
    activation_bytes: int

    @property
    def numel(self) -> int:
        """Parameters of the whole model."""
        return sum(self.numels)

    def sub_groups(self, world_size: int, size: int) -> list[int]:
        """Elements of a rank in each of the engine's sub-groups, padding included: one is closed when it has reached `size`."""
        groups = [0]
        for numel in self.numels:
            if groups[-1] >= size:
                groups.append(0)
            groups[-1] += partition_numel(numel, world_size)
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank, by what they are for.

    `device` and `host` are held all the time; `phases` are what the parts of a step need of the device besides, in turns.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def longest_phase(self) -> str:
        """The part of a step that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def device_peak(self) -> int:
        """The most on the device."""
        return sum(self.device.values()) + sum(self.phases[self.longest_phase].values())

    @property
    def host_peak(self) -> int:
        """The most of the host, without the interpreter and its libraries."""
        return sum(self.host.values())


def zero_settings(ds_config: Mapping[str, Any], hidden_size: int) -> DeepSpeedZeroConfig:
    """The ZeRO section with DeepSpeed's defaults, "auto" replaced as the Trainer does it: by the model's width."""
    by_width = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    section = dict(ds_config["zero_optimization"])
    for key, value in by_width.items():
        if section.get(key) == "auto":
            section[key] = value
    return DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})


def training_memory(sizes: Sizes, zero: DeepSpeedZeroConfig, world_size: int, *, on_cpu: bool = False) -> Memory:
    """What one rank of `world_size` needs to train.

    Args:
        on_cpu: ranks without an accelerator, over gloo: it copies what it reduces, untouched buffers cost nothing, and no
            memory is page-locked by torch.
    """
    groups = sizes.sub_groups(world_size, int(zero.sub_group_size))
    width, whole = sizes.itemsize, sizes.numel * sizes.itemsize
    bucket = int(zero.reduce_bucket_size) * width
    filled = min(bucket, whole)
    params_away, states_away = (_device(each) != "none" for each in (zero.offload_param, zero.offload_optimizer))
    params, states = _param_bytes(zero, groups, width, on_cpu), _state_bytes(zero, groups, width, on_cpu)
    host = {**(params if params_away else {}), **(states if states_away else {})}
    device = {**({} if params_away else params), **({} if states_away else states)}
    device["reduction bucket"] = filled if on_cpu else bucket
    gathered = min(whole, (int(zero.max_live_parameters) + max(sizes.numels)) * width)
    forth_and_back = {"gathered parameters": gathered, "activations": sizes.activation_bytes}
    reduced = (2 if on_cpu else 1) * filled
    phases = {"forward and backward": forth_and_back, "last reduction": {"gradients being reduced": reduced}}
    if filled < whole:  # the bucket is emptied on the way
        forth_and_back["gradients being reduced"] = reduced
    if not states_away:
        phases["optimizer's step"] = {"gradients of a group": (4 + width) * max(groups)}
    return Memory(device=device, host=host, phases=phases)


def _param_bytes(zero: DeepSpeedZeroConfig, groups: Sequence[int], width: int, on_cpu: bool) -> dict[str, int]:
    """A rank's parameters where they live: in the engine's buffer, and in those that parameters on NVMe pass through."""
    shard, offload = sum(groups), zero.offload_param
    if offload is None or _device(offload) == "none":
        return {"parameters": width * shard}
    if _device(offload) == "cpu":
        return {"parameters": _locked(width * shard, on_cpu)}  # page-locked whatever `pin_memory` says
    in_memory = min(shard, int(offload.max_in_cpu))
    written_together = max(groups) if in_memory < shard else 0
    return {
        "parameters": _locked(width * in_memory, on_cpu),
        "parameters' swap buffers": width * (int(offload.buffer_count) * int(offload.buffer_size) + written_together),
    }


def _state_bytes(zero: DeepSpeedZeroConfig, groups: Sequence[int], width: int, on_cpu: bool) -> dict[str, int]:
    """A rank's gradients and optimizer, of the elements of each sub-group."""
    shard, offload = sum(groups), zero.offload_optimizer
    optimizer = {"optimizer": (4 * shard if width < 4 else 0) + MOMENT_BYTES * shard}
    if offload is None or _device(offload) == "none":
        return {"gradients": width * shard, **optimizer}
    unlocked = on_cpu or not offload.pin_memory
    gradients = {"gradients": _locked(width * shard, unlocked)}
    if _device(offload) == "nvme":
        return {
            **gradients,
            "optimizer's swap buffers": 4 * max(groups) * int(offload.buffer_count),
            "gradients of a group": 4 * max(groups),
            "moments of a group, first step": MOMENT_BYTES * max(groups),
        }
    return {**gradients, **optimizer, "gradients in fp32": sum(_locked(4 * each, unlocked) for each in groups)}


def _locked(nbytes: int, unlocked: bool) -> int:
    """What so many bytes take in page-locked memory, or else in ordinary memory."""
    return nbytes if unlocked else 1 << max(0, nbytes - 1).bit_length()


def _device(section: Any) -> str:
    """Where an offload section puts things: none (no offload), cpu or nvme."""
    return "none" if section is None else str(getattr(section.device, "value", section.device))
