"""Read and write the shards of ZeRO parameters: the only module that accesses their `ds_*` and NVMe attributes.

A shard is the flat, padded range of a parameter that one rank keeps. A parameter is partitioned while the rank has only its
shard, and gathered while the rank has all values as well. `local_*` is about the shard that this rank stores, `current_*` about
the values that forward would use now. They differ if the parameter is gathered and was changed in place. No function here
communicates.
"""

# DeepSpeed stores its state in attributes of parameters, which type stubs do not declare.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus, is_zero_param
from torch import nn

from zero_sft.plan.partition import FlatRange, full_range, partition_numel, shard_range
from zero_sft.storage import arena


def is_sharded(tensor: torch.Tensor) -> bool:
    """True if `tensor` is a ZeRO-3 parameter, partitioned or gathered."""
    return is_zero_param(tensor)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the full tensor's shape, partitioned or not."""
    return tuple(tensor.ds_shape) if is_sharded(tensor) else tuple(tensor.shape)


@contextlib.contextmanager
def shown_in_full_shape(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let partitioned parameters have their full shapes, without contents, while something asks for no more."""
    shown = [(param, param.data) for param in params if is_sharded(param) and not is_gathered(param)]
    for param, data in shown:
        param.data = torch.empty(1, dtype=data.dtype, device=data.device).expand(full_shape(param))
    try:
        yield
    finally:
        for param, data in shown:
            param.data = data


def full_numel(tensor: torch.Tensor) -> int:
    """Return the number of elements of the full tensor, partitioned or not."""
    return math.prod(full_shape(tensor))


def represent(param: nn.Parameter, numel: int) -> None:
    """Say that a parameter stands for `numel` weights, of which it holds codes."""
    param.represented_numel = numel


def holds_codes(tensor: torch.Tensor) -> bool:
    """True if a tensor holds codes, not values: it can neither be trained nor saved as a weight."""
    return hasattr(tensor, "represented_numel")


def weight_numel(tensor: torch.Tensor) -> int:
    """Return the number of weights of a full tensor: its elements, unless it holds the codes of more."""
    return getattr(tensor, "represented_numel", None) or full_numel(tensor)


def parameter_numel(model: nn.Module) -> int:
    """Return the number of weights of the model's full parameters. Tied parameters count once."""
    return sum(weight_numel(param) for param in model.parameters())


def num_partitions(tensor: torch.Tensor) -> int:
    """Return the number of a tensor's shards: 1 if it is not sharded."""
    return tensor.ds_zero_partition_world_size if is_sharded(tensor) else 1


def partition_index(tensor: torch.Tensor) -> int:
    """Return the number of this rank's shard: 0 if the tensor is not sharded."""
    return tensor.ds_zero_partition_rank if is_sharded(tensor) else 0


def local_range(param: nn.Parameter) -> FlatRange:
    """Return the flat range of `param` that this rank keeps."""
    return shard_range(param.ds_numel, partition_index(param), num_partitions(param))


def _arena_slot(name: str, param: nn.Parameter) -> arena.ArenaSlot | None:
    """Return the arena slot for this parameter's shard, padding included; None if DeepSpeed's settings put it on NVMe."""
    init, numel = param.ds_sharded_init, param.ds_tensor.ds_numel
    if init.remote_device == OffloadDeviceEnum.nvme:
        if init.param_swapper.swappable_tensor(numel=numel):
            return None
        device = torch.device("cpu")
    else:
        device = init.local_device if param.ds_persist else init.remote_device
        device = torch.device("cpu" if device == OffloadDeviceEnum.cpu else device)
    is_pinned = init.pin_memory and device.type == "cpu"
    return arena.ArenaSlot(name=name, numel=numel, dtype=param.dtype, device=device, pinned=is_pinned)


def mark_partitioned(param: nn.Parameter, sharded_init: object) -> None:
    """Put a parameter that `sharded_init` has converted into the partitioned state, with an empty shard."""
    attach(param, torch.empty(0, dtype=param.dtype, device="cpu"), PartitionedParamStatus.NOT_AVAILABLE)
    param.ds_numel_aligned = param.ds_tensor.ds_numel * num_partitions(param)
    param.ds_status = ZeroParamStatus.NOT_AVAILABLE
    param.ds_sharded_init = sharded_init


def attach(param: nn.Parameter, shard: torch.Tensor, status: PartitionedParamStatus = PartitionedParamStatus.AVAILABLE) -> None:
    """Make `shard` (flat, padded length) the shard of `param`. Its contents may be filled later."""
    shard.requires_grad = False
    shard.ds_numel = partition_numel(param.ds_numel, num_partitions(param))
    shard.status = status
    shard.final_location = None
    param.ds_tensor = shard


def fill_shards(params: Mapping[str, nn.Parameter], fill: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
    """Allocate and attach every parameter's shard, and let `fill` write the shards.

    `fill` receives zeroed flat tensors of padded length, by name. It is called once with all shards that stay in memory, then
    once for each shard on NVMe, which is in a swap buffer that is then written out and released.
    """
    slots = {name: _arena_slot(name, param) for name, param in params.items()}
    memory = arena.allocate([slot for slot in slots.values() if slot is not None])
    for name, shard in memory.items():
        attach(params[name], shard)
    fill(memory)
    for name in [name for name, slot in slots.items() if slot is None]:
        param = params[name]
        buffer = param.nvme_swapper.get_buffer(param, param.ds_tensor.ds_numel)
        shard = torch.empty(0, dtype=param.dtype, device=buffer.device)
        shard.data = buffer.data
        attach(param, shard)
        shard.final_location = OffloadDeviceEnum.nvme
        shard.zero_()
        fill({name: shard})
        param.nvme_swapper.swap_out_and_release([param])


def local_shard(param: nn.Parameter) -> torch.Tensor:
    """Return the real elements (without padding) of this rank's shard, flat.

    A shard on NVMe is read into a swap buffer, so call `release_shard` after the elements have been used.
    """
    if param.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE:
        param.nvme_swapper.swap_in([param], async_op=False)
    return param.ds_tensor.narrow(0, 0, local_range(param).numel)


def is_gathered(param: nn.Parameter) -> bool:
    """True if a parameter is gathered on this rank now, as an engine keeps small ones. Forward then uses the full values."""
    return param.ds_status == ZeroParamStatus.AVAILABLE


def is_partitioned(param: nn.Parameter) -> bool:
    """True if this rank holds only its shard of a parameter now, and no gather has begun."""
    return param.ds_status == ZeroParamStatus.NOT_AVAILABLE


def has_secondary_shard(param: nn.Parameter) -> bool:
    """True if hpZ keeps a second shard of the parameter, for gathers inside the node."""
    return param.ds_secondary_tensor is not None


def uses_nvme(param: nn.Parameter) -> bool:
    """True if the parameter's shards may be on NVMe."""
    return getattr(param, "nvme_swapper", None) is not None


def current_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the full tensor's shape as forward uses it now."""
    return tuple(tensor.shape) if is_sharded(tensor) and is_gathered(tensor) else full_shape(tensor)


def current_range(param: nn.Parameter) -> FlatRange:
    """Return the flat range of `current_shape` that is this rank's part."""
    numel = param.numel() if is_gathered(param) else param.ds_numel
    return shard_range(numel, partition_index(param), num_partitions(param))


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


@contextlib.contextmanager
def new_values(param: nn.Parameter, *, keep: bool = False) -> Iterator[tuple[FlatRange, torch.Tensor]]:
    """Provide a flat range and a tensor to write its new values to. They are the parameter's when the context ends.

    The range is that of this rank's shard; of a gathered parameter, it is the full one. Every rank must write its own.

    Args:
        keep: whether the tensor has the present values at first.
    """
    if is_gathered(param):
        present = param.detach().reshape(-1)
        values = present.clone() if keep else torch.empty_like(present)
        yield full_range(param.ds_numel), values
        param.data.copy_(values.view(param.shape))
        own = local_range(param)
        local_shard(param).copy_(values[own.start : own.stop])
        _release_changed(param)
        return
    with new_shard(param) as (flat_range, values):
        yield flat_range, values


@contextlib.contextmanager
def new_part(tensor: torch.Tensor) -> Iterator[tuple[FlatRange, torch.Tensor]]:
    """Provide what `new_values` does; of a tensor that is not sharded, the full range and its flat memory."""
    if not is_sharded(tensor):
        yield full_range(tensor.numel()), tensor.detach().view(-1)
        return
    with new_values(tensor) as part:
        yield part


@contextlib.contextmanager
def new_shard(param: nn.Parameter) -> Iterator[tuple[FlatRange, torch.Tensor]]:
    """Provide this rank's flat range and a tensor to write its new values to.

    If the parameter is gathered, `set_gathered` has to give it the new values of all ranks afterwards.
    """
    yield local_range(param), local_shard(param)
    _release_changed(param)


def padded_shard(param: nn.Parameter) -> torch.Tensor:
    """Return this rank's shard with its padding, flat. For parameters in memory."""
    return param.ds_tensor


def set_gathered(param: nn.Parameter, shards_of_all: Sequence[torch.Tensor]) -> None:
    """Give a gathered parameter the values of all ranks' shards, padding included."""
    values = torch.cat(list(shards_of_all))[: param.ds_numel]
    param.data.copy_(values.view(param.shape))


def _release_changed(param: nn.Parameter) -> None:
    """Write a changed shard to NVMe, if it belongs there, and drop hpZ's copy of its former values, as DeepSpeed does."""
    if param.ds_tensor.final_location == OffloadDeviceEnum.nvme:
        param.nvme_swapper.swap_out_and_release([param])
    param.ds_secondary_tensor = None


def release_shard(param: nn.Parameter) -> None:
    """Release the swap buffer that `local_shard` may have used."""
    if param.ds_tensor.final_location == OffloadDeviceEnum.nvme:
        param.nvme_swapper.remove_partition_and_release_buffers([param])


def replace_contents(param: nn.Parameter, contents: torch.Tensor) -> None:
    """Give a parameter other contents. The Parameter object and its attributes stay the same."""
    replacement = nn.Parameter(contents, requires_grad=param.requires_grad)
    replacement.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, replacement)


def move_contents(param: nn.Parameter, device: torch.device) -> None:
    """Move an unpartitioned parameter to uninitialised memory on `device` (none on meta). The object stays the same."""
    replace_contents(param, torch.empty(param.shape, dtype=param.dtype, device=device))


def shards_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if this rank's shards of two tensors are equal; of unpartitioned tensors, the full tensors."""
    if not (is_sharded(one) and is_sharded(other)):
        return torch.equal(one, other)
    equal = full_shape(one) == full_shape(other) and torch.equal(local_shard(one), local_shard(other))
    for param in (one, other):
        release_shard(param)
    return equal
