"""Forward hooks that let a partitioned model run before `deepspeed.initialize`.

Each module gathers its parameters before its forward and partitions them after it, so `forward` and `generate` work on a newly
loaded model. A DeepSpeed engine registers its hooks in `DeepSpeedZeRoOffload.setup_zero_stage3_hooks`; the hooks here are
removed just before, so that no module has both.

For inference only: a backward pass would find the parameters partitioned. All ranks must run the same modules in the same
order, since each forward communicates.
"""

# DeepSpeed stores its state in attributes of parameters, which type stubs do not declare.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, register_external_parameter
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from zero_sft.zero import shards

_HANDLES, _GATHERED = "_zero_sft_gather_hooks", "_zero_sft_gathered"
"""Attributes of a module: the handles of its hooks, and for each forward that has not ended the parameters gathered for it."""

_ENGINE = "_zero_sft_engine"
"""Attribute of the modules of a model around which an engine has started."""

SMALL_BYTES = 2 * 2**30
"""A model up to this size may be gathered in full on every rank for a while."""


def install_gather_hooks(model: nn.Module) -> None:
    """Let modules gather their parameters around forward, until an engine takes over. Every rank; does not communicate.

    Modules that have the hooks already keep them.
    """
    _patch_engine_start()
    for module in model.modules():
        if _HANDLES not in module.__dict__ and any(map(shards.is_sharded, _gathered_with(module))):
            hooks = [module.register_forward_pre_hook(_before), module.register_forward_hook(_after, always_call=True)]
            setattr(module, _HANDLES, hooks)


def gather_with(module: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Let parameters of other modules be gathered around a module's forward as well, here and by an engine.

    DeepSpeed's other means, leaf modules, reduce gradients before they are computed where the module's input needs none.
    """
    for param in params:
        register_external_parameter(module, param)


def _gathered_with(module: nn.Module) -> list[nn.Parameter]:
    external = module.__dict__.get("_external_params", {})
    return [*module.parameters(recurse=False), *external.values()]


def remove_gather_hooks(model: nn.Module) -> None:
    """Remove the hooks of `install_gather_hooks` from all modules of `model`. Does not communicate."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _before(module: nn.Module, args: Any) -> None:
    gathered = [param for param in _gathered_with(module) if shards.is_sharded(param) and shards.is_partitioned(param)]
    for has_secondary in (False, True):  # with hpZ, a copy inside the node is gathered instead, in a call without the others
        group = [param for param in gathered if shards.has_secondary_shard(param) == has_secondary]
        if group:
            group[0].all_gather_coalesced(group).wait()
    module.__dict__.setdefault(_GATHERED, []).append(gathered)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    stack = module.__dict__.get(_GATHERED)
    gathered = stack.pop() if stack else []
    if gathered:
        gathered[0].partition(param_list=gathered)


def _patch_engine_start() -> None:
    """Patch DeepSpeed, once per process and for good, so that an engine removes our hooks before it registers its hooks."""
    original = DeepSpeedZeRoOffload.setup_zero_stage3_hooks
    if getattr(original, "removes_gather_hooks", False):
        return

    @functools.wraps(original)
    def setup_zero_stage3_hooks(self: DeepSpeedZeRoOffload) -> None:
        remove_gather_hooks(self.module)
        for module in self.module.modules():
            module.__dict__[_ENGINE] = True
            if _holds_experts(module):
                set_z3_leaf_module(module, True)
        with _modules_without_parameters_hidden(self.module):
            original(self)

    setup_zero_stage3_hooks.removes_gather_hooks = True  # type: ignore[attr-defined]
    DeepSpeedZeRoOffload.setup_zero_stage3_hooks = setup_zero_stage3_hooks


def _holds_experts(module: nn.Module) -> bool:
    """Return whether a module has experts as its own parameters, as transformers 5 merges them.

    DeepSpeed gives a leaf module's parameters a gradient of zeros where a rank has used none of them. Else this rank would not
    take part in their reduction, and the others would wait for it.
    """
    return "Experts" in type(module).__name__ and any(map(shards.is_sharded, module.parameters(recurse=False)))


@contextlib.contextmanager
def _modules_without_parameters_hidden(model: nn.Module) -> Iterator[None]:
    """Keep DeepSpeed's hooks off modules that have nothing to gather.

    DeepSpeed compares the order of hooked modules between ranks, and prefetches by it. A mixture of experts may call its
    activation once for each expert that is in use, which differs between ranks: DeepSpeed raises an error, or the ranks gather
    in different orders and wait for each other forever.
    """
    hidden = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is not None and not any(map(_gathered_with, child.modules()))
    ]
    for module, name, _ in hidden:
        module._modules[name] = None
    try:
        yield
    finally:
        for module, name, child in hidden:
            module._modules[name] = child


def has_engine(model: nn.Module) -> bool:
    """Return whether a DeepSpeed engine has started around the model."""
    return _ENGINE in model.__dict__


def is_small(model: nn.Module) -> bool:
    """True if the full model takes at most `SMALL_BYTES`, and no parameter is on NVMe, where DeepSpeed has few swap buffers."""
    if any(shards.uses_nvme(param) for param in model.parameters()):
        return False
    return sum(math.prod(shards.full_shape(param)) * param.element_size() for param in model.parameters()) <= SMALL_BYTES


def summon_full_params(model: nn.Module) -> AbstractContextManager[None]:
    """Keep a small model gathered, so that many forwards need only one gather; do nothing for a large model.

    Every rank; communicates.
    """
    return GatheredParameters(list(model.parameters()), enabled=is_small(model))
