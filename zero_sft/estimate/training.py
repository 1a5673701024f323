"""Memory of ZeRO-3 training: what DeepSpeed's engine holds on a device and on its host, and what a step takes besides.

Sources: the allocations of DeepSpeed 0.19's stage 3 optimizer, whose published estimators
(https://deepspeed.readthedocs.io/en/stable/memory.html) count the model's states as here, and nothing of what a step takes;
ZeRO (https://arxiv.org/abs/1910.02054), section 3. Left out: fragmentation of the device's allocator, hpZ's second copy.
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

    def shard_numel(self, world_size: int) -> int:
        """Elements that a rank keeps, padding included."""
        return sum(partition_numel(numel, world_size) for numel in self.numels)


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
        on_cpu: ranks without an accelerator, over gloo: it copies what it reduces, and untouched buffers cost nothing.
    """
    shard, width, whole = sizes.shard_numel(world_size), sizes.itemsize, sizes.numel * sizes.itemsize
    master = 4 * shard if width < 4 else 0
    group = min(shard, int(zero.sub_group_size) + partition_numel(max(sizes.numels), world_size))
    bucket = int(zero.reduce_bucket_size) * width
    filled = min(bucket, whole)
    offload = _device(zero.offload_optimizer)
    held: dict[str, dict[str, int]] = {"device": {}, "host": {}}
    held["device" if _device(zero.offload_param) == "none" else "host"]["parameters"] = _param_bytes(zero, shard, width)
    place = held["device" if offload == "none" else "host"]
    place["gradients"] = width * shard
    if offload == "nvme":
        place["optimizer's swap buffers"] = 4 * group * int(getattr(zero.offload_optimizer, "buffer_count", 0))
    else:
        place["optimizer"] = master + MOMENT_BYTES * shard
    if offload == "cpu":
        place["gradients in fp32"] = 4 * shard
    held["device"]["reduction bucket"] = filled if on_cpu else bucket
    gathered = min(whole, (int(zero.max_live_parameters) + max(sizes.numels)) * width)
    forth_and_back = {"gathered parameters": gathered, "activations": sizes.activation_bytes}
    reduced = (2 if on_cpu else 1) * filled
    phases = {"forward and backward": forth_and_back, "last reduction": {"gradients being reduced": reduced}}
    if filled < whole:  # the bucket is emptied on the way
        forth_and_back["gradients being reduced"] = reduced
    if offload == "none":
        phases["optimizer's step"] = {"gradients of a group": (4 + width) * group}
    return Memory(device=held["device"], host=held["host"], phases=phases)


def _device(section: Any) -> str:
    """Where an offload section puts things: none (no offload), cpu or nvme."""
    return "none" if section is None else str(getattr(section.device, "value", section.device))


def _param_bytes(zero: DeepSpeedZeroConfig, shard: int, width: int) -> int:
    """A rank's shards where they live; of those on NVMe, the buffers that they pass through."""
    offload = zero.offload_param
    if offload is None or _device(offload) != "nvme":
        return width * shard
    return width * min(shard, int(offload.buffer_count) * int(offload.buffer_size) + int(offload.max_in_cpu))
