"""Memory of one forward and backward pass, by running both on tensors that have a shape and no data.

torch's fake tensors go through the model's own code, its checkpointing and autograd, so what is kept, for how long, and what
is computed again is the model's own doing on any architecture. Every storage is counted from its making to its end; parameters
are not, and a gradient only until it is complete: ZeRO-3 reduces it then.
"""

import copy
import dataclasses
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from zero_sft.errors import ConfigError
from zero_sft.loading import skeleton
from zero_sft.loading.request import ModelSpec


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on: those alive `now`, and the most at any time, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Don't count what is there already."""
        self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        nbytes = storage.nbytes()
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, nbytes)

    def _end(self, nbytes: int) -> None:
        self.now -= nbytes


def peak_bytes(spec: ModelSpec, *, batch_size: int, length: int, checkpointing: bool) -> int:
    """The most bytes of activations, logits and the gradient under way, of one rank, in one pass over (batch_size, length).

    Raises:
        ConfigError: a model whose code looks at its data.
    """
    config: PreTrainedConfig = copy.deepcopy(spec.config)
    config.use_cache = False
    spec = dataclasses.replace(spec, config=config)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            model: Any = skeleton.instantiate(spec)
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            live = LiveMemory()
            for tensor in (*model.parameters(), *model.buffers()):
                live.leave_out(tensor)
            with live:
                tokens = torch.zeros(batch_size, length, dtype=torch.long)
                model(input_ids=tokens, labels=tokens).loss.backward()
    except Exception as error:  # a model's own code may raise anything
        raise ConfigError(
            f"the activations of {spec.config.model_type} can't be counted: {type(error).__name__}: {error}",
            code="estimate.activations_uncountable",
        ) from error
    return live.peak
