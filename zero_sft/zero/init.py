"""`ShardedInit`: `deepspeed.zero.Init` that makes ZeRO parameters without ever having their contents.

`zero.Init` allocates every fresh parameter whole, broadcasts it from rank 0 and keeps a slice: one model of traffic for
contents that a checkpoint replaces anyway. Here the model is built on the meta device, as plain `from_pretrained` builds it,
so that modules see the shapes, dtypes and tied objects they would see there; when the model is complete, `shard` makes
each of its parameters a ZeRO parameter in the partitioned state, whose shard is attached later (`shards.attach`). No
allocation, no copy, no collective.

The conversion waits for the whole model, where `zero.Init` converts after each one: models that write to a child's
weight in their own `__init__` (sinusoidal positions, weight norm) then find it whole.
"""

# DeepSpeed hangs its state on parameters as attributes that no stub knows.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init, PartitionedParamStatus, ZeroParamStatus, is_zero_param
from deepspeed.utils import groups
from torch import nn


class ShardedInit(Init):
    """Context in which one model is built, on every rank, without communication.

    Parameters keep their identity: a Parameter object that two modules share stays shared. Those that appear later, when the
    context is long gone (an adapter's, say), take `zero.Init`'s own way.

    Args:
        ds_config: a DeepSpeed config of stage 3 without "auto" values.
    """

    def __init__(self, ds_config: dict[str, Any]) -> None:
        # No tensor overrides: dtype and device are the meta construction's, as in plain from_pretrained.
        # The groups of hpZ are made once a process; a second model takes those of the first.
        hpz = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        group = groups._get_zero_param_intra_parallel_group() if hpz else None
        super().__init__(config_dict_or_path=ds_config, tensor_overrides=[], zero_param_parallel_group=group)

    def shard(self, model: nn.Module) -> None:
        """Make every parameter of a model built in this context, that is none yet, a ZeRO parameter, without a shard."""
        for param in list(model.parameters()):
            if not is_zero_param(param):
                self.shard_parameter(param)

    def _post_init_method(self, module: nn.Module) -> None:
        """DeepSpeed calls this when a module's `__init__` has returned, and would partition its parameters then."""

    def shard_parameter(self, param: nn.Parameter) -> None:
        """Make one parameter a ZeRO parameter in the partitioned state: its shape stays known, its contents are given up."""
        self._convert_to_deepspeed_param(param)
        dtype = self.dtype if param.is_floating_point() else param.dtype
        hollow = nn.Parameter(torch.empty(0, dtype=dtype, device=self.local_device), requires_grad=param.requires_grad)
        hollow.__dict__.update(param.__dict__)
        torch.utils.swap_tensors(param, hollow)  # the object stays, its contents leave the meta device
        padded = self._aligned_size(param)
        param.ds_tensor = torch.empty(0, dtype=dtype, device="cpu")
        param.ds_tensor.ds_numel = padded // param.ds_zero_partition_world_size
        param.ds_tensor.status = PartitionedParamStatus.NOT_AVAILABLE
        param.ds_tensor.final_location = None
        param.ds_numel_aligned = padded
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        param.ds_sharded_init = self
