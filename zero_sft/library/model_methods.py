"""Methods of a loaded model that would see empty tensors, since its parameters are sharded.

transformers and torch compute from `param.shape` and `param.data`, which are empty for a partitioned parameter. The model gets
methods of the same names that answer as those of an unsharded model, or raise an error that says what to do; they are
attributes of this one model, so that its class stays as it is. What DeepSpeed itself calls goes to the original.

| method | on a sharded model |
| --- | --- |
| `num_parameters`, `get_memory_footprint` | count full parameters |
| `state_dict` | an error, unless the parameters are gathered or `keep_vars` is set |
| `load_state_dict` | each rank takes its part of the full tensors; not after an engine has started |
| `save_pretrained` | `zero_sft.save_pretrained`, on every rank |
| `resize_token_embeddings` | transformers' own, and the new parameters are sharded; not after an engine has started |
| `to`, `cuda`, `cpu` | an error if they would move the shards; another dtype is that of a later save |
| `copy.deepcopy` | an error |
| `print(model)` | modules that show their weights' shapes show the full ones |

Left out: methods of submodules, which are torch's.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys  # the type of what `load_state_dict` returns
from transformers import PreTrainedModel

from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.printable import first_of
from zero_sft.saving.export import save_pretrained
from zero_sft.zero import shards
from zero_sft.zero.gather_hooks import has_engine, install_gather_hooks
from zero_sft.zero.init import shard_parameters

_FRAMES = 30
"""The number of callers among which DeepSpeed is looked for."""


def install_model_methods(model: PreTrainedModel, world: World) -> None:
    """Give the model methods that know of its shards. Every rank; does not communicate."""
    methods = {
        "num_parameters": _num_parameters,
        "get_memory_footprint": _memory_footprint,
        "load_state_dict": _load_state_dict,
        "save_pretrained": _save_pretrained,
        "resize_token_embeddings": functools.partial(_resize_token_embeddings, world=world),
        "_apply": _apply,
        "__deepcopy__": _refuse_copy,
    }
    for name, method in methods.items():
        setattr(model, name, _bound(method, model))
    model.register_state_dict_pre_hook(_require_full)
    for module in model.modules():
        if not type(module).__module__.startswith("torch.nn.") and next(module.parameters(recurse=False), None) is not None:
            module.extra_repr = _bound(_extra_repr, module, when_gone=str)  # of a copy, which refers to the original


def _refuse_gone() -> NoReturn:
    raise ArgumentError(
        "the model is gone, since nothing refers to it. Keep what `load_model` returns in a variable.", code="model.gone"
    )


def _bound(method: Callable[..., Any], module: nn.Module, when_gone: Callable[[], Any] = _refuse_gone) -> Callable[..., Any]:
    """Bind a method to a module without a cycle of references: a model that is deleted has to free its memory at once.

    Args:
        when_gone: is called instead if the module is gone: the method was called on a model that no variable holds.
    """
    reference = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        module = reference()
        return when_gone() if module is None else method(module, *args, **kwargs)

    return call


def _extra_repr(module: nn.Module) -> str:
    """Describe a module in full shapes; some norms show that of their weight."""
    with shards.shown_in_full_shape(module.parameters(recurse=False)):
        return type(module).extra_repr(module)


def _num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Count the elements of the model's full parameters, with the arguments of transformers' method."""
    left_out = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return sum(
        shards.weight_numel(param)
        for name, param in model.named_parameters()
        if (param.requires_grad or not only_trainable) and not (exclude_embeddings and name in left_out)
    )


def _memory_footprint(model: PreTrainedModel, return_buffers: bool = True) -> int:
    """Return the bytes of the unsharded model, on all ranks together, with the arguments of transformers' method."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(shards.full_numel(tensor) * tensor.element_size() for tensor in tensors)


def _require_full(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise unless a state dict would hold the full tensors. Called by `state_dict`."""
    if keep_vars or not any(_is_empty(param) for param in model.parameters()):
        return
    if _is_called_by_deepspeed() or _is_called_by("peft.", "set_peft_model_state_dict"):
        return
    raise ArgumentError(
        "state_dict() of a sharded model would hold empty tensors. To save the model, call zero_sft.save_pretrained(model, "
        "folder) on every rank; for tensors in memory, call state_dict() inside deepspeed.zero.GatheredParameters(list("
        "model.parameters())) on every rank.",
        code="model.state_dict_of_shards",
    )


def _is_empty(param: nn.Parameter) -> bool:
    return shards.is_sharded(param) and not shards.is_gathered(param)


def _is_called_by_deepspeed() -> bool:
    """Return whether one of the callers is DeepSpeed, which knows what a partitioned parameter is."""
    return _is_called_by("deepspeed.")


def _is_called_by(package: str, function: str | None = None) -> bool:
    """Return whether one of the callers is of a package, and is the function, if one is named.

    PEFT asks for the names alone when it loads an adapter; when it saves one, it would write empty tensors.
    """
    frame: Any = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        is_named = function is None or frame.f_code.co_name == function
        if is_named and frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False


def _load_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Copy full tensors into the model, of which each rank takes its part. Every rank; does not communicate.

    Args:
        strict: whether a missing or unexpected name is an error, as in torch.
        assign: must be False.

    Raises:
        ArgumentError: an engine has started; a tensor has another shape; with `strict`, a name is missing or unexpected.
    """
    if _is_called_by_deepspeed():
        return type(model).load_state_dict(model, state_dict, strict=strict, assign=assign)
    _require_no_engine(model, "load_state_dict", "Its optimizer has a copy of the weights: resume with its load_checkpoint.")
    if assign:
        raise ArgumentError(
            "load_state_dict(assign=True) can't be used with a sharded model: leave it out.", code="model.assign"
        )
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if torch.is_tensor(tensor)}
    missing, unexpected = sorted(tensors.keys() - state_dict.keys()), sorted(state_dict.keys() - tensors.keys())
    reshaped = [
        name for name in tensors.keys() & state_dict.keys() if tuple(state_dict[name].shape) != shards.full_shape(tensors[name])
    ]
    if reshaped or (strict and (missing or unexpected)):
        problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(reshaped)))
        listed = "; ".join(f"{what}: {first_of(names)}" for what, names in problems if names)
        raise ArgumentError(
            f"the state dict is not that of {type(model).__name__}: {listed}. Give full tensors of this model.",
            code="model.other_state_dict",
        )
    with torch.no_grad():
        for name in tensors.keys() & state_dict.keys():
            with shards.new_part(tensors[name]) as (flat_range, values):
                values.copy_(state_dict[name].reshape(-1)[flat_range.start : flat_range.stop])
    return _IncompatibleKeys(missing, unexpected)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **others: Any,
) -> None:
    """Save the model, on every rank; with a `state_dict`, which a caller has gathered, as transformers does.

    Raises:
        ArgumentError: an option that is not supported here.
    """
    if state_dict is not None:
        type(model).save_pretrained(
            model,
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            max_shard_size=max_shard_size,
            **others,
        )
        return
    others.pop("save_function", None)
    if given := [name for name, value in {**others, "push_to_hub": push_to_hub}.items() if value not in (None, False)]:
        raise ArgumentError(
            f"save_pretrained of a sharded model does not take {', '.join(given)}. Call zero_sft.save_pretrained(model, "
            "folder).",
            code="model.save_option",
        )
    save_pretrained(model, save_directory, max_file_bytes=_file_bytes(max_shard_size))


def _file_bytes(size: int | str) -> int:
    """Convert a size such as "5GB" to bytes, as transformers does."""
    if isinstance(size, int):
        return size
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    for unit, factor in units.items():
        if size.upper().endswith(unit) and size[: -len(unit)].strip().isdigit():
            return int(size[: -len(unit)]) * factor
    raise ArgumentError(
        f"max_shard_size must be a number of bytes, or a text such as 5GB; got {size!r}", code="arguments.wrong_value"
    )


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
    *,
    world: World,
) -> nn.Module:
    """Resize the embeddings as transformers does, and shard the new parameters. Every rank; communicates.

    New rows are drawn from rank 0's random generator.
    """
    _require_no_engine(model, "resize_token_embeddings", "Resize them before deepspeed.initialize.")
    if new_num_tokens is not None and (type(new_num_tokens) is not int or new_num_tokens < 1):
        raise ArgumentError(
            f"resize_token_embeddings({new_num_tokens!r}): expected a number of rows, at least 1.", code="model.bad_size"
        )
    own_state = torch.get_rng_state()
    state = broadcast_bytes(world, own_state.numpy().tobytes() if world.is_main else None)
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    try:
        embeddings = type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    finally:
        if not world.is_main:
            torch.set_rng_state(own_state)
    shard_parameters(model)
    install_gather_hooks(model)
    return embeddings


def _require_no_engine(model: nn.Module, method: str, remedy: str) -> None:
    if has_engine(model):
        raise ArgumentError(
            f"{method} can't change a model around which a DeepSpeed engine has started. {remedy}",
            code="model.engine_has_started",
        )


def _apply(model: PreTrainedModel, function: Any, recurse: bool = True) -> Any:
    """Apply a conversion of `to`, `half` or `cuda`, unless it moves the parameters to another device.

    After another dtype, the shards stay as they are, and are cast when the model is saved.
    """
    for param in model.parameters():
        if shards.is_sharded(param):
            device = function(torch.empty(0, dtype=param.dtype, device=param.device)).device
            if device != param.device:
                raise ArgumentError(
                    f"a sharded model can't be moved from {param.device} to {device}: its shards stay where they are. Load it "
                    "under a DeepSpeed config with the device that you want.",
                    code="model.moved",
                )
    return type(model)._apply(model, function, recurse)


def _refuse_copy(model: PreTrainedModel, memo: Any) -> NoReturn:
    raise ArgumentError(
        f"copy.deepcopy of a sharded {type(model).__name__} would copy empty tensors. Load the model twice: for a reference "
        "model call load_model again.",
        code="model.deepcopy",
    )
