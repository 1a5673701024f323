"""A partitioned model that runs before `deepspeed.initialize`: its modules gather what they need, and let it go.

The engine brings hooks of its own; until then these stand in for them, so that `forward` and `generate` work on a freshly
loaded model as on any other. When an engine takes the model over (it registers its hooks through
`DeepSpeedZeRoOffload.setup_zero_stage3_hooks`), these are removed first, so that no module has two sets.

For inference only: what a backward pass would need is gone by then. All ranks must run the same modules in the same order.
"""

# DeepSpeed hangs its state on parameters as attributes that no stub knows.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import nn

from zero_sft.zero import shards

_HANDLES = "_zero_sft_gather_hooks"


def install_gather_hooks(model: nn.Module) -> None:
    """Let `model` gather its parameters around each module's forward until an engine takes over it, or a part of it."""
    _remove_hooks_when_an_engine_starts()
    for module in model.modules():
        if any(shards.is_sharded(param) for param in module.parameters(recurse=False)):
            hooks = [module.register_forward_pre_hook(_before), module.register_forward_hook(_after, always_call=True)]
            setattr(module, _HANDLES, hooks)


def remove_gather_hooks(model: nn.Module) -> None:
    """Take away what `install_gather_hooks` added, anywhere in `model`."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _before(module: nn.Module, args: Any) -> None:
    gathered = [
        param
        for param in module.parameters(recurse=False)
        if shards.is_sharded(param) and param.ds_status == ZeroParamStatus.NOT_AVAILABLE
    ]
    for group in _by_secondary(gathered):
        group[0].all_gather_coalesced(group).wait()
    module.__dict__.setdefault("_zero_sft_gathered", []).append(gathered)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    stack = module.__dict__.get("_zero_sft_gathered")
    gathered = stack.pop() if stack else []
    if gathered:
        gathered[0].partition(param_list=gathered)


def _by_secondary(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """hpZ: parameters with a copy inside the node gather from there, others from all ranks; never both in one call."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for param in params:
        groups.setdefault(param.ds_secondary_tensor is not None, []).append(param)
    return list(groups.values())


def _remove_hooks_when_an_engine_starts() -> None:
    """Once a process: an engine that sets up its hooks finds the model without ours."""
    original = DeepSpeedZeRoOffload.setup_zero_stage3_hooks
    if getattr(original, "stands_down_for_engines", False):
        return

    @functools.wraps(original)
    def setup_zero_stage3_hooks(self: DeepSpeedZeRoOffload) -> None:
        remove_gather_hooks(self.module)
        original(self)

    setup_zero_stage3_hooks.stands_down_for_engines = True  # type: ignore[attr-defined]
    DeepSpeedZeRoOffload.setup_zero_stage3_hooks = setup_zero_stage3_hooks


SMALL_BYTES = 2 * 2**30
"""A model up to this size may stand whole on every rank for a while."""


def is_small(model: nn.Module) -> bool:
    """True if the whole model takes at most `SMALL_BYTES`, and no parameter has to pass DeepSpeed's few NVMe swap buffers."""
    if any(getattr(param, "nvme_swapper", None) is not None for param in model.parameters()):
        return False
    return sum(math.prod(shards.full_shape(param)) * param.element_size() for param in model.parameters()) <= SMALL_BYTES


@contextlib.contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Keep a small model gathered, so that many forwards in a row gather once; a large one is left as it is. Every rank."""
    if not is_small(model):
        yield
        return
    with GatheredParameters(list(model.parameters())):
        yield


def gather_full(param: nn.Parameter) -> torch.Tensor:
    """A copy of the whole parameter, gathered from all ranks. Every rank; communicates."""
    if not shards.is_sharded(param) or param.ds_status == ZeroParamStatus.AVAILABLE:
        return param.detach().clone()
    param.all_gather_coalesced([param]).wait()
    copy = param.detach().clone()
    param.partition(param_list=[param])
    return copy
