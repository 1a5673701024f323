"""`ShardedInit`: a `deepspeed.zero.Init` that makes ZeRO parameters without allocating their contents.

`zero.Init` allocates every new parameter in full, broadcasts it from rank 0 and keeps a slice. This transfers a whole model
whose contents a checkpoint then replaces. Here the model is built on the meta device, as in plain `from_pretrained`, so modules
see the same shapes, dtypes and tied objects. When the model is complete, `make_zero_parameters` turns each parameter into a
ZeRO parameter in the partitioned state with an empty shard; its shard is attached later (`shards.attach`). There is no
allocation, no copy and no collective.

`zero.Init` converts parameters after each module; this class waits for the whole model. Models whose `__init__` writes to a
child's weight (sinusoidal positions, weight norm) therefore find that weight in full.
"""

# DeepSpeed stores its state in attributes of parameters, which type stubs do not declare.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from deepspeed.utils import groups
from torch import nn

from zero_sft.zero import shards


class ShardedInit(Init):
    """Context in which one model is built. Every rank; does not communicate.

    Parameters keep their identity: a Parameter object that two modules share stays shared. Parameters created after the context
    has exited (e.g. adapters) go through `zero.Init` as usual.

    Args:
        ds_config: a DeepSpeed config of stage 3 without "auto" values.
    """

    def __init__(self, ds_config: dict[str, Any]) -> None:
        # No tensor overrides: the construction on meta sets dtype and device, as in plain from_pretrained.
        # hpZ's process groups are created once per process, so a second model reuses those of the first.
        hpz = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        group = groups._get_zero_param_intra_parallel_group() if hpz else None
        super().__init__(config_dict_or_path=ds_config, tensor_overrides=[], zero_param_parallel_group=group)

    def make_zero_parameters(self, model: nn.Module) -> None:
        """Turn all parameters of `model` that are not ZeRO parameters yet into such, in the partitioned state."""
        for param in list(model.parameters()):
            if not is_zero_param(param):
                self.make_zero_parameter(param)

    def _post_init_method(self, module: nn.Module) -> None:
        """Do nothing. DeepSpeed calls this after each module's `__init__` to partition the module's parameters."""

    def make_zero_parameter(self, param: nn.Parameter) -> None:
        """Turn one parameter into a ZeRO parameter in the partitioned state, with an empty shard. Its contents are lost."""
        self._convert_to_deepspeed_param(param)
        dtype = self.dtype if param.is_floating_point() else param.dtype
        shards.replace_contents(param, torch.empty(0, dtype=dtype, device=self.local_device))  # it leaves the meta device
        shards.mark_partitioned(param, self)


def shard_parameters(model: nn.Module) -> None:
    """Shard the parameters that were added to a model after its load. Every rank, with equal values; does not communicate.

    A model of the stock loader is left as it is: DeepSpeed shards its new parameters when the engine starts.
    """
    init = next((param.ds_sharded_init for param in model.parameters() if hasattr(param, "ds_sharded_init")), None)
    if init is None:
        return
    new = {name: param for name, param in model.named_parameters() if not is_zero_param(param)}
    values = {name: param.detach() for name, param in new.items()}
    for param in new.values():
        init.make_zero_parameter(param)

    def fill(targets: Mapping[str, torch.Tensor]) -> None:
        for name, target in targets.items():
            own = shards.local_range(new[name])
            target[: own.numel].copy_(values[name].reshape(-1)[own.start : own.stop])

    shards.fill_shards(new, fill)
