"""The internals of PEFT that this package uses, listed in this one place. Imports PEFT; so only functions import this module.

PEFT renames the modules that it adapts, and adds its parameters to them. What of a model belongs to an adapter, and under which
name it is saved, is PEFT's to say: `saved_tensors` asks it.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn

from zero_sft.errors import ExportError, UnsupportedVersionError

TESTED = ("0.21.2",)

_OF_ADAPTER = re.compile(r"(^|\.)(lora_[A-Za-z_]+|original_module)(\.|$)")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)")


def check() -> None:
    """Check that PEFT's internals are where this package needs them.

    Raises:
        UnsupportedVersionError: one is not; the error names it.
    """
    for holder, name in (
        (LoraLayer, "get_delta_weight"), (LoraLayer, "get_base_layer"), (ParamWrapper, "get_param"),
        (AuxiliaryTrainingWrapper, "adapter_state_dict"),
    ):  # fmt: skip
        if not hasattr(holder, name) and not any(hasattr(cls, name) for cls in holder.__subclasses__()):
            raise UnsupportedVersionError(
                f"peft {peft.__version__} has moved {holder.__name__}.{name}, which adapters need; tested: "
                f"{', '.join(TESTED)}. Install a tested release.",
                code="version.peft_moved",
            )


def is_adapted(model: Any) -> bool:
    """Return whether a model is one that PEFT wraps."""
    return isinstance(model, peft.PeftModel)


def adapter_name(model: Any) -> str:
    """Return the name of a model's adapter.

    Raises:
        ExportError: it has several.
    """
    names = list(model.peft_config)
    if len(names) > 1:
        raise ExportError(
            f"the model has several adapters ({', '.join(names)}), and one is saved at a time. Delete the others first "
            "(model.delete_adapter).",
            code="adapter.several",
        )
    return names[0]


def saved_tensors(model: Any) -> dict[str, Any]:
    """Return the tensors of the model that its adapter consists of, by the names under which PEFT saves them."""
    state = model.state_dict(keep_vars=True)
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name(model), save_embedding_layers=False)


def config_to_save(model: Any) -> Any:
    """Return the config of a model's adapter, as it is saved: for inference."""
    config = copy.deepcopy(model.peft_config[adapter_name(model)])
    config.inference_mode = True
    base = config.base_model_name_or_path
    if base and Path(base).is_dir():
        config.base_model_name_or_path = str(Path(base).resolve())  # so that it is found from another folder
    return config


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each module that LoRA has wrapped, with its name; of nested ones the inner ones as well."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def is_adapted_layer(module: Any) -> bool:
    """Return whether a module is one that LoRA has wrapped."""
    return isinstance(module, LoraLayer)


def foreign_parameters(layer: Any) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield the modules of a wrapped module whose forward computes with parameters of other modules, and these parameters.

    An adapter of a parameter is added to the parameter; DoRA takes the norm of the base weight.
    """
    factors = [part.weight for part in (*layer.lora_A.values(), *layer.lora_B.values())]
    if isinstance(layer, ParamWrapper):
        yield layer, [layer.get_param(), *factors]
    if isinstance(layer, Embedding):
        yield layer, [*layer.lora_embedding_A.values(), *layer.lora_embedding_B.values()]
    for dora in layer.lora_magnitude_vector.values():
        yield dora, [*layer.get_base_layer().parameters(recurse=False), *factors]


def obstacle_to_merging(layer: Any) -> str:
    """Say what a wrapped module has that can't be merged here; "" if there is nothing."""
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
    if len(layer.r) != 1:
        return "is one of several adapters"
    if unknown := variants - {"DoraLinearVariant", "DoraEmbeddingVariant"}:
        return f"is of the kind {min(unknown)}"
    if any(layer.lora_bias.values()):
        return "has a bias"
    return f"is for a {type(layer).__name__}" if layer.__class__.__name__.startswith(("Conv", "_Conv", "Multihead")) else ""


def adapted_parameter(layer: Any) -> torch.nn.Parameter:
    """Return the base model's parameter to which a wrapped module's adapter belongs."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def delta(layer: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what a wrapped module's adapter adds to its weight. The adapter's parameters are gathered.

    Raises:
        ExportError: it has another shape than the weight.
    """
    (name,) = layer.r
    result = layer.get_delta_weight(name)
    if tuple(result.shape) != shape:
        raise ExportError(
            f"an adapter's product has the shape {list(result.shape)}, and its weight {list(shape)}. Merge it with PEFT.",
            code="adapter.not_mergeable",
        )
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraMagnitude:
    """DoRA's trained lengths, of the weight's rows or, `by_column`, of its columns."""

    values: torch.Tensor
    by_column: bool


def dora_magnitude(layer: Any) -> DoraMagnitude | None:
    """Return the trained lengths of a wrapped module; None without DoRA."""
    for dora in layer.lora_magnitude_vector.values():
        if isinstance(dora, DoraLinearLayer):
            by_column = isinstance(dora, DoraEmbeddingLayer) or isinstance(layer, Embedding) or dora.fan_in_fan_out
            return DoraMagnitude(values=dora.weight, by_column=by_column)
    return None


def is_merged(layer: Any) -> bool:
    """Return whether a wrapped module's adapter is in the weight."""
    return bool(layer.merged_adapters)


def mark_merged(layer: Any) -> None:
    """Let forward compute without a wrapped module's adapter, which is in the weight."""
    layer.merged_adapters.extend(layer.r)


def base_name(name: str) -> str | None:
    """Return the base model's name of a tensor in the state dict of an adapted model; None if it is the adapter's alone.

    A module that was trained as a whole stands for the original.
    """
    if _OF_ADAPTER.search(name):
        return None
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))
