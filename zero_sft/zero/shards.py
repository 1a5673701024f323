"""Read and write the shards of ZeRO parameters: the accessors of `ds_*` attributes.

No function here communicates.
"""

# DeepSpeed stores its state in attributes of parameters, which type stubs do not declare.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus, is_zero_param
from torch import nn

from zero_sft.plan.partition import FlatRange, shard_range
from zero_sft.storage import arena


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlacement:
    """The place where a parameter's shard is kept between its uses."""

    device: torch.device
    pinned: bool
    on_nvme: bool


def is_sharded(tensor: torch.Tensor) -> bool:
    """True if `tensor` is a ZeRO-3 parameter."""
    return is_zero_param(tensor)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the full tensor's shape, partitioned or not."""
    return tuple(tensor.ds_shape) if is_sharded(tensor) else tuple(tensor.shape)


def local_range(param: nn.Parameter) -> FlatRange:
    """Return the flat range of `param` that this rank keeps."""
    return shard_range(param.ds_numel, param.ds_zero_partition_rank, param.ds_zero_partition_world_size)


def shard_placement(param: nn.Parameter) -> ShardPlacement:
    """Return the place where DeepSpeed's offload settings put this parameter's shard."""
    init = param.ds_sharded_init
    if init.remote_device == OffloadDeviceEnum.nvme:
        on_nvme = init.param_swapper.swappable_tensor(numel=param.ds_tensor.ds_numel)
        return ShardPlacement(device=torch.device("cpu"), pinned=init.pin_memory and not on_nvme, on_nvme=on_nvme)
    device = init.local_device if param.ds_persist else init.remote_device
    device = torch.device("cpu" if device == OffloadDeviceEnum.cpu else device)
    return ShardPlacement(device=device, pinned=init.pin_memory and device.type == "cpu", on_nvme=False)


def _slot(name: str, param: nn.Parameter) -> arena.ArenaSlot:
    """Return the arena slot for this parameter's shard, padding included."""
    placement = shard_placement(param)
    numel = param.ds_tensor.ds_numel
    return arena.ArenaSlot(name=name, numel=numel, dtype=param.dtype, device=placement.device, pinned=placement.pinned)


def attach(param: nn.Parameter, shard: torch.Tensor) -> None:
    """Make `shard` (flat, padded length) the shard of `param`. Its contents may be filled later."""
    shard.requires_grad = False
    shard.ds_numel = param.ds_tensor.ds_numel
    shard.status = PartitionedParamStatus.AVAILABLE
    shard.final_location = None
    param.ds_tensor = shard


def fill_shards(params: Mapping[str, nn.Parameter], fill: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
    """Allocate and attach every parameter's shard, and let `fill` write the shards.

    `fill` receives zeroed flat tensors of padded length, by name. It is called once with all shards that stay in memory, then
    once for each shard on NVMe, which is in a swap buffer that is then written out and released.
    """
    on_nvme = {name: param for name, param in params.items() if shard_placement(param).on_nvme}
    memory = arena.allocate([_slot(name, param) for name, param in params.items() if name not in on_nvme])
    for name, shard in memory.items():
        attach(params[name], shard)
    fill(memory)
    for name, param in on_nvme.items():
        buffer = param.nvme_swapper.get_buffer(param, param.ds_tensor.ds_numel)
        shard = torch.empty(0, dtype=param.dtype, device=buffer.device)
        shard.data = buffer.data
        attach(param, shard)
        shard.final_location = OffloadDeviceEnum.nvme
        shard.zero_()
        fill({name: shard})
        param.nvme_swapper.swap_out_and_release([param])


def local_shard(param: nn.Parameter) -> torch.Tensor:
    """Return the real elements (without padding) of this rank's shard, flat. A shard on NVMe is read into a swap buffer."""
    if param.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE:
        param.nvme_swapper.swap_in([param], async_op=False)
    return param.ds_tensor.narrow(0, 0, local_range(param).numel)


def is_gathered(param: nn.Parameter) -> bool:
    """True if a parameter is gathered on this rank now, as an engine keeps small ones. Forward then uses the full values."""
    return param.ds_status == ZeroParamStatus.AVAILABLE


def current_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the full tensor's shape as forward uses it now."""
    return tuple(tensor.shape) if is_sharded(tensor) and is_gathered(tensor) else full_shape(tensor)


def current_range(param: nn.Parameter) -> FlatRange:
    """Return the flat range of `current_shape` that this rank exports."""
    numel = param.numel() if is_gathered(param) else param.ds_numel
    return shard_range(numel, param.ds_zero_partition_rank, param.ds_zero_partition_world_size)


@contextlib.contextmanager
def current_values(param: nn.Parameter) -> Iterator[torch.Tensor]:
    """Provide the elements of `current_range` as forward uses them now, flat.

    A gathered parameter may have been changed in place, so its full values are used instead of its shard. A shard on NVMe is in
    a swap buffer while the context is open.
    """
    if is_gathered(param):
        flat_range = current_range(param)
        yield param.detach().reshape(-1)[flat_range.start : flat_range.stop]
        return
    try:
        yield local_shard(param)
    finally:
        release_shard(param)


def num_partitions(param: nn.Parameter) -> int:
    """Return the number of ranks that share a parameter's shards."""
    return param.ds_zero_partition_world_size


def release_shard(param: nn.Parameter) -> None:
    """Release the swap buffer that `local_shard` may have used."""
    if param.ds_tensor.final_location == OffloadDeviceEnum.nvme:
        param.nvme_swapper.remove_partition_and_release_buffers([param])


def move_contents(param: nn.Parameter, device: torch.device) -> None:
    """Move an unpartitioned parameter to uninitialised memory on `device` (none on meta). The object stays the same."""
    replacement = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=device), requires_grad=param.requires_grad)
    replacement.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, replacement)


def shards_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if this rank's shards of two tensors are equal; of unpartitioned tensors, the full tensors."""
    if not (is_sharded(one) and is_sharded(other)):
        return torch.equal(one, other)
    equal = full_shape(one) == full_shape(other) and torch.equal(local_shard(one), local_shard(other))
    for param in (one, other):
        release_shard(param)
    return equal
