"""Trace which tensors each step of a model's initialisation writes, on the meta device.

transformers initialises a model module by module. On the meta device this costs nothing and shows the tensors that each step
writes: missing ones, buffers, and sometimes a part of a stored tensor (a padding row that is always zeroed). The real run then
executes only the steps that matter, and knows how long each full tensor is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from zero_sft.transformers_internals import initialize_module


@dataclass(frozen=True, slots=True, kw_only=True)
class InitStep:
    """One call of `_init_weights` on `module`, and the names of the parameters and buffers that it writes."""

    owner: PreTrainedModel
    module: nn.Module
    writes: frozenset[str]


class _WrittenStorages(TorchDispatchMode):
    """Collect the storages that operations write to, directly or through views."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and torch.is_tensor(value):
                self.storages.add(value.untyped_storage()._cdata)
        return func(*args, **kwargs)


def trace_init_writes(model: PreTrainedModel) -> list[InitStep]:
    """Return all initialisation steps in order. Any rank; does not communicate.

    The model must be unpartitioned and on the meta device, and its stored tensors must be marked as initialised. A step that
    fails without data counts as writing all parameters and buffers of its module, without those of submodules.
    """
    names: dict[int, set[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(tensor.untyped_storage()._cdata, set()).add(name)
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    steps = []
    with _WrittenStorages() as written:
        for owner, module in _visits(model, model):
            written.storages = set()
            try:
                initialize_module(owner, module)
                writes = {name for storage in written.storages for name in names.get(storage, ())}
            except Exception:  # noqa: BLE001 - code that needs values can raise anything on meta
                writes = {prefixes[id(module)] + leaf for leaf in (*module._parameters, *module._buffers)}
            steps.append(InitStep(owner=owner, module=module, writes=frozenset(writes)))
    return steps


def _visits(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Iterate over modules in transformers' order (children first), each with the model whose `_init_weights` handles it."""
    for child in module.children():
        yield from _visits(child, child if isinstance(child, PreTrainedModel) else owner)
    yield owner, module
