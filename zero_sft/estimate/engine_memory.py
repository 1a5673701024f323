"""Estimate the memory of ZeRO-3 training: what DeepSpeed's engine holds on device and host, and what a step adds.

Sources: the allocations of DeepSpeed 0.19's stage 3 optimizer, and ZeRO (https://arxiv.org/abs/1910.02054), section 3.
DeepSpeed's published estimators (https://deepspeed.readthedocs.io/en/stable/memory.html) count the same model states, but not
the needs of a step. torch rounds every page-locked block up to a power of two (`CachingHostAllocator`). Not counted:
fragmentation of the device's allocator, the second copy of hpZ, and the Trainer's separate sub-groups with and without weight
decay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from zero_sft.errors import ConfigError
from zero_sft.plan.partition import partition_numel

MOMENT_BYTES = 8
"""Bytes per element of Adam's two moments in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the model.

    Attributes:
        numels: elements of each parameter.
        itemsize: bytes per element.
        activation_bytes: of a pass.
        trained_numels: elements of each parameter that is trained; None: all are.
    """

    numels: Sequence[int]
    itemsize: int
    activation_bytes: int
    trained_numels: Sequence[int] | None = None

    @property
    def trained(self) -> Sequence[int]:
        """Elements of each trained parameter."""
        return self.numels if self.trained_numels is None else self.trained_numels

    @property
    def numel(self) -> int:
        """Number of elements of the whole model."""
        return sum(self.numels)

    def sub_groups(self, world_size: int, size: int) -> list[int]:
        """Return a rank's padded elements in each sub-group of the optimizer. A sub-group is full once it reaches `size`."""
        groups = [0]
        for numel in self.trained:
            if groups[-1] >= size:
                groups.append(0)
            groups[-1] += partition_numel(numel, world_size)
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank by purpose.

    `device` and `host` are held all the time. `phases` has the additional device memory of each part of a step; one part runs
    after the other.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def longest_phase(self) -> str:
        """The part of a step that needs the most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def device_peak(self) -> int:
        """Peak bytes on the device."""
        return sum(self.device.values()) + sum(self.phases[self.longest_phase].values())

    @property
    def host_peak(self) -> int:
        """Peak bytes on the host, without the interpreter and its libraries."""
        return sum(self.host.values())


def zero_settings(ds_config: Mapping[str, Any], hidden_size: int) -> DeepSpeedZeroConfig:
    """Return the ZeRO section with DeepSpeed's defaults; "auto" is replaced from the hidden size, as in the Trainer.

    Raises:
        ConfigError: DeepSpeed refuses a key or a value of the section.
    """
    auto_values = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    section = dict(ds_config["zero_optimization"])
    for key, value in auto_values.items():
        if section.get(key) == "auto":
            section[key] = value
    try:
        return DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})
    except pydantic.ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise ConfigError(
            f"DeepSpeed refuses zero_optimization in the DeepSpeed config: {details}. See docs/configs.md for shipped ones.",
            code="ds_config.refused_by_deepspeed",
        ) from error


def training_memory(sizes: Sizes, zero: DeepSpeedZeroConfig, world_size: int, *, on_cpu: bool = False) -> Memory:
    """Estimate the memory that one rank of `world_size` needs to train.

    Args:
        on_cpu: ranks have no accelerator and use gloo, which copies what it reduces. Untouched buffers then cost nothing, and
            torch page-locks no memory.
    """
    groups = sizes.sub_groups(world_size, int(zero.sub_group_size))
    width, model_bytes = sizes.itemsize, sizes.numel * sizes.itemsize
    trained_bytes = sum(sizes.trained) * width
    bucket = int(zero.reduce_bucket_size) * width
    filled = min(bucket, trained_bytes)
    shard = sum(partition_numel(numel, world_size) for numel in sizes.numels)
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    (device if _device(zero.offload_param) == "none" else host).update(_param_bytes(zero, shard, groups, width, on_cpu))
    (device if _device(zero.offload_optimizer) == "none" else host).update(_state_bytes(zero, groups, width, on_cpu))
    device["reduction bucket"] = filled if on_cpu else bucket
    gathered = min(model_bytes, (int(zero.max_live_parameters) + max(sizes.numels)) * width)
    forward_and_backward = {"gathered parameters": gathered, "activations": sizes.activation_bytes}
    reduced = (2 if on_cpu else 1) * filled
    phases = {"forward and backward": forward_and_backward, "last reduction": {"gradients being reduced": reduced}}
    if filled < trained_bytes:  # the bucket is also reduced during the backward pass
        forward_and_backward["gradients being reduced"] = reduced
    if "optimizer" in device:
        phases["optimizer's step"] = {"gradients of a group": (4 + width) * max(groups)}
    return Memory(device=device, host=host, phases=phases)


def checkpoint_copy_bytes(sizes: Sizes, zero: DeepSpeedZeroConfig, world_size: int) -> int:
    """Return the bytes of a rank's copy of what a checkpoint holds: weights, master weights and moments; page-locked."""
    shard = sum(sizes.sub_groups(world_size, int(zero.sub_group_size)))
    return shard * (sizes.itemsize + (4 if sizes.itemsize < 4 else 0) + MOMENT_BYTES)


def _param_bytes(zero: DeepSpeedZeroConfig, shard: int, groups: Sequence[int], width: int, on_cpu: bool) -> dict[str, int]:
    """Return the bytes of a rank's `shard` elements: in the engine's buffer and in the swap buffers for NVMe."""
    offload = zero.offload_param
    if offload is None or _device(offload) == "none":
        return {"parameters": width * shard}
    if _device(offload) == "cpu":
        return {"parameters": _locked(width * shard, on_cpu)}  # page-locked regardless of `pin_memory`
    in_memory = min(shard, int(offload.max_in_cpu))
    written_together = max(groups) if in_memory < shard else 0
    return {
        "parameters": _locked(width * in_memory, on_cpu),
        "parameters' swap buffers": width * (int(offload.buffer_count) * int(offload.buffer_size) + written_together),
    }


def _state_bytes(zero: DeepSpeedZeroConfig, groups: Sequence[int], width: int, on_cpu: bool) -> dict[str, int]:
    """Return the bytes of a rank's gradients and optimizer states, given its elements in each sub-group."""
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
    return {**gradients, **optimizer, "gradients in fp32": sum(_locked(4 * numel, unlocked) for numel in groups)}


def _locked(nbytes: int, unlocked: bool) -> int:
    """Return the memory that `nbytes` take: in page-locked memory, the next power of two."""
    return nbytes if unlocked else 1 << max(0, nbytes - 1).bit_length()


def _device(section: Any) -> str:
    """Return the target of an offload section: "none", "cpu" or "nvme"."""
    return "none" if section is None else str(getattr(section.device, "value", section.device))
