"""Which tensors each step of a model's initialisation writes, found out without doing it.

transformers initialises a model module by module. With everything on the meta device that costs nothing, and shows what each
step writes: tensors that the checkpoint lacks, buffers, and now and then a part of a tensor that the checkpoint has (a padding
row that is zeroed whatever was loaded). The real run then does the steps that matter, and knows how long each tensor has to
stand there whole.
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
    """One call of `_init_weights`, and the names of the parameters and buffers that it writes."""

    owner: PreTrainedModel
    module: nn.Module
    writes: frozenset[str]

    def run(self) -> None:
        """Do it."""
        initialize_module(self.owner, self.module)


class _Written(TorchDispatchMode):
    """Collects the storages that operations write to, through whatever view."""

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
    """All steps in their order, for a model that is whole and on the meta device, its loaded tensors marked.

    A step that can't be done without data counts as writing all that its module holds itself.
    """
    names: dict[int, set[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(tensor.untyped_storage()._cdata, set()).add(name)
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    steps = []
    with _Written() as seen:
        for owner, module in _visits(model, model):
            seen.storages = set()
            try:
                InitStep(owner=owner, module=module, writes=frozenset()).run()
                writes = {name for storage in seen.storages for name in names.get(storage, ())}
            except Exception:  # noqa: BLE001 - whatever a model does with values, a tensor without any can't give it
                writes = {prefixes[id(module)] + leaf for leaf in (*module._parameters, *module._buffers)}
            steps.append(InitStep(owner=owner, module=module, writes=frozenset(writes)))
    return steps


def _visits(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Modules in transformers' order, children first, each with the model whose `_init_weights` is in charge of it."""
    for child in module.children():
        yield from _visits(child, child if isinstance(child, PreTrainedModel) else owner)
    yield owner, module
