"""Count the memory of one forward and backward pass, by running both on tensors that have a shape but no data.

torch's fake tensors run through the model's code, its checkpointing and autograd. So on any architecture, the real code decides
what is kept and what is recomputed. Every storage counts from its creation until it is freed. Parameters do not count. A
gradient counts only until it is complete, because ZeRO-3 then reduces it.
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

from zero_sft.adapters.options import LoraOptions
from zero_sft.errors import ConfigError
from zero_sft.four_bit.linear import Linear4bit
from zero_sft.loading import skeleton
from zero_sft.loading.four_bit import make_all_4bit
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import ModelSpec


class LiveMemory(TorchDispatchMode):
    """Count the bytes of storages created while the mode is on: `now` is alive at present, `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Exclude a tensor that exists already."""
        self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        nbytes = storage.nbytes()
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, nbytes)

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes


class _CountedLinear4bit(Linear4bit):
    """A linear module in 4 bits whose dequantised weight has a size and no values."""

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.layout.shape, dtype=dtype)


def peak_bytes(
    spec: ModelSpec,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool,
    lora: LoraOptions | None = None,
    load_options: LoadOptions | None = None,
    tiled_mlp: int | None = None,
    fused_head: bool = False,
) -> int:
    """Return a rank's peak bytes of activations, logits and incomplete gradients in one pass over (batch_size, length).

    Args:
        lora: the adapters, if any are trained: autograd keeps less for frozen weights, and TRL's checkpointing is reentrant.
        fused_head: whether the loss is computed as TRL does it, in chunks of tokens; else from all logits at once.
        tiled_mlp: the tokens that an MLP computes at a time.
        load_options: whether the model is in 4 bits; then the weight of a module exists while it computes.

    Raises:
        ConfigError: the model's code can't run without data.
    """
    config: PreTrainedConfig = copy.deepcopy(spec.config)
    config.use_cache = False
    spec = dataclasses.replace(spec, config=config)
    adapted: Any = None
    if fused_head:
        from trl.trainer.utils import add_fused_lm_head  # TRL takes seconds to import
    if lora is not None and lora.enabled:
        from zero_sft.adapters.attach import adapted_on_meta, lora_config

        base = make_all_4bit(skeleton.build_on_meta(spec)[0], load_options or LoadOptions())
        adapted = adapted_on_meta(base, lora_config(lora))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            model: Any = skeleton.instantiate(spec)
            if adapted is not None:
                model = _with_adapters(model, adapted)
            if fused_head:
                add_fused_lm_head(model.get_base_model() if adapted is not None else model)
            for param in filter(lambda param: param.requires_grad, model.parameters()):
                param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            model.train()
            if tiled_mlp is not None:
                from zero_sft.zero.tiled_mlp import tile_mlps  # DeepSpeed's sequence parallelism

                tile_mlps(model, tiled_mlp)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": adapted is not None})
            live = LiveMemory()
            for tensor in (*model.parameters(), *model.buffers()):
                live.leave_out(tensor)
            with live:
                tokens = torch.zeros(batch_size, length, dtype=torch.long)
                model(input_ids=tokens, labels=tokens, **({"fused_lm_head": True} if fused_head else {})).loss.backward()
    except Exception as error:  # the code of a model may raise anything
        raise ConfigError(
            f"the activations of {spec.config.model_type} can't be counted: {type(error).__name__}: {error}",
            code="estimate.activations_uncountable",
        ) from error
    return live.peak


def _with_adapters(model: Any, adapted: Any) -> Any:
    """Give a model with adapters on meta the fake tensors of the model without them, and new ones.

    PEFT moves and converts what it makes, which fails for fake tensors, and does not for those on meta.
    """
    from zero_sft.adapters.peft_internals import base_name  # PEFT, which an estimate without adapters does not need

    buffers, params = dict(model.named_buffers()), dict[int, torch.nn.Parameter]()
    dtype = next(model.parameters()).dtype  # of the adapters as well; on meta they have torch's default
    for prefix, module in adapted.named_modules():
        for name, param in module._parameters.items():
            if param is not None and id(param) not in params:
                is_new = base_name(f"{prefix}.{name}") is None
                contents = torch.empty(param.shape, dtype=dtype if is_new else param.dtype)
                params[id(param)] = torch.nn.Parameter(contents, requires_grad=param.requires_grad)
            module._parameters[name] = None if param is None else params[id(param)]
        if isinstance(module, Linear4bit):
            module.__class__ = _CountedLinear4bit
        for name in module._buffers:
            module._buffers[name] = buffers[str(base_name(f"{prefix}.{name}"))]
    adapted.enable_input_require_grads()
    return adapted
