"""Build a model without weights: the class that its config asks for, inside `ShardedInit`.

The class is looked up as transformers' Auto classes do. It is constructed under the contexts of plain `from_pretrained` (meta
device, default dtype, no tying), so the result is the same model, parameter for parameter.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from zero_sft.cluster.world import World
from zero_sft.conversion.quantized import config_parts, remove_quantization
from zero_sft.errors import ArgumentError, ConfigError
from zero_sft.generation_config import read_generation_config
from zero_sft.loading.request import ModelSpec
from zero_sft.printable import first_of
from zero_sft.transformers_internals import (
    adjust_generation_config,
    check_attention,
    configured_attention,
    internal,
    kept_dtypes,
    model_mapping,
    set_attention,
    supported_attentions,
    tied_names,
    zero3_under,
)
from zero_sft.zero.init import ShardedInit

logger = logging.getLogger(__name__)


def resolve_class(
    config: PreTrainedConfig, model_class: Any, folder: str | Path, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the concrete model class and the config that it takes: for some classes a composite config's text part.

    Args:
        model_class: a `PreTrainedModel` subclass, an Auto class, or None for `AutoModelForCausalLM`.

    Raises:
        ConfigError: the Auto class has no model for this config, or only one in code that is not trusted.
        ArgumentError: `model_class` is neither a model class nor an Auto class, or is abstract.
    """
    auto = AutoModelForCausalLM if model_class is None else model_class
    if isinstance(auto, type) and issubclass(auto, PreTrainedModel):
        if auto.forward is nn.Module.forward:
            raise ArgumentError(
                f"model_class must be a class with a forward, such as LlamaForCausalLM, or an Auto class, got {auto.__name__}, "
                "which is abstract",
                code="arguments.wrong_value",
            )
        return auto, config
    mapping = model_mapping(auto)
    if mapping is None:
        raise ArgumentError(
            f"model_class must be a PreTrainedModel class or an Auto class, got {model_class!r}", code="arguments.wrong_value"
        )
    reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if reference and trust_remote_code:
        return internal("get_class_from_dynamic_module")(reference, str(folder)), config
    if type(config) not in mapping:
        if reference:
            raise ConfigError(
                f"{folder} brings its own code for {auto.__name__} ({reference}), which runs only with "
                "trust_remote_code=True (--trust_remote_code). Read the code first.",
                code="config.remote_code_untrusted",
            )
        suitable = first_of(getattr(config, "architectures", None) or (), 1) or "an Auto class that has this type"
        raise ConfigError(
            f"{auto.__name__} has no model for {type(config).__name__} (model_type {config.model_type!r}). Name the folder of "
            f"a model that it has, or call load_model with another model_class: {suitable}.",
            code="config.no_such_head",
        )
    cls = internal("_get_model_class")(config, mapping)
    text = config.sub_configs.get("text_config")
    return (cls, config.get_text_config()) if text and getattr(cls, "config_class", None) == text else (cls, config)


def attention_of(config: PreTrainedConfig, requested: str | None) -> str | None:
    """Return the `requested` attention, else the one that config.json names; None leaves the choice to transformers."""
    return requested or configured_attention(config)


def require_attention(cls: type[PreTrainedModel], config: PreTrainedConfig, name: str) -> None:
    """Raise `ArgumentError` unless the class can use this attention on this machine. Any rank; does not communicate."""
    try:
        check_attention(cls, config, name)
    except Exception as error:  # ValueError, ImportError, or any error of a kernel download
        names = ", ".join(supported_attentions(cls))
        reason = str(error).strip().splitlines()[0].partition(" The only possible arguments")[0]  # without the alternatives
        raise ArgumentError(
            f"attn_implementation {name!r} can't be used with {cls.__name__}: {reason}\n"
            f"{cls.__name__} takes {names}. Give one as --attn_implementation; without it the model's config.json or "
            "transformers chooses.",
            code="arguments.attention_unusable",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model without weights: in full shapes on the meta device, until `sharder` makes them ZeRO parameters.

    `state` is its full state dict on meta: names, shapes, dtypes. `sharder` partitions its parameters.
    """

    model: PreTrainedModel
    state: Mapping[str, torch.Tensor]
    sharder: ShardedInit


def build_for_sharding(spec: ModelSpec, ds_config: Mapping[str, Any]) -> Skeleton:
    """Construct the model inside `ShardedInit`. Every rank; does not communicate.

    Raises:
        ConfigError: DeepSpeed refuses the DeepSpeed config.
    """
    try:
        sharder = ShardedInit(dict(ds_config))
    except Exception as error:  # pydantic's ValidationError, DeepSpeedConfigError, AssertionError, KeyError, TypeError
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(
            f"DeepSpeed refuses the DeepSpeed config: {reason}\ndocs/configs.md explains the shipped ones.",
            code="ds_config.refused_by_deepspeed",
        ) from error
    model, state = build_on_meta(spec, sharder)
    return Skeleton(model=model, state=state, sharder=sharder)


def build_on_meta(spec: ModelSpec, *around: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Construct the model on the meta device inside the contexts `around`; return it with its full state dict.

    Any rank; does not communicate.
    """
    model = instantiate(spec, *around, _on_meta())
    internal("patch_output_recorders")(model)
    kept = kept_dtypes(model, spec.dtype)
    state = {
        name: torch.empty(tensor.shape, dtype=kept(name) or tensor.dtype, device="meta")
        for name, tensor in model.state_dict().items()
        if torch.is_tensor(tensor)
    }
    return model, state


def without_ties(model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's tensors without the names that its class ties to another name.

    A save writes these tensors, unless the load has dropped a tie (`saving/export.py` goes by the model's own tensors).
    """
    tied = tied_names(model)
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def constructor_buffers(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Compute the buffers by running the model's constructor without parameters. Any rank; does not communicate."""
    return dict(instantiate(spec, _parameters_on_meta()).named_buffers(remove_duplicate=False))


def instantiate(spec: ModelSpec, *around: Any) -> PreTrainedModel:
    """Construct the model as plain `from_pretrained` does, inside the contexts `around`. Any rank; does not communicate."""
    cls, config = resolve_class(spec.config, spec.model_class, spec.folder, spec.trust_remote_code)
    config = remove_quantization(copy.deepcopy(config))
    attention = attention_of(config, spec.attn_implementation)
    if attention:
        require_attention(cls, config, attention)
        set_attention(config, attention)
    for part in config_parts(config):
        part.dtype = spec.dtype
    with _as_from_pretrained(internal("local_torch_dtype")(spec.dtype, cls.__name__), *around):
        try:
            return cls(config)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
            if isinstance(cls.config_class, type) and not isinstance(config, cls.config_class):
                raise ConfigError(
                    f"{spec.folder}: {cls.__name__} expects a {cls.config_class.__name__}, but the model's config is a "
                    f"{type(config).__name__} (model_type {config.model_type!r}). Leave model_class out, or give this "
                    "model's class.",
                    code="config.unbuildable",
                ) from error
            raise ConfigError(
                f"{spec.folder}: {cls.__name__} can't be made from its config.json: {type(error).__name__}: {error}. "
                "Compare it with the original.",
                code="config.unbuildable",
            ) from error


def build_untied_on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Construct a model of the class on the meta device, without ties. Any rank; does not communicate."""
    with _as_from_pretrained(_on_meta()):
        return cls(copy.deepcopy(config))


@contextlib.contextmanager
def _as_from_pretrained(*around: Any) -> Iterator[None]:
    """Construct models as plain `from_pretrained` does: without ties and without ZeRO-3, inside the contexts `around`."""
    with contextlib.ExitStack() as stack:
        for context in (zero3_under(None), internal("no_tie_weights")(), internal("apply_patches")(), *around):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), internal("meta_device_safe_creation_ops")():
        yield


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when it is registered, before it is initialised. Buffers stay where they are."""

    def on_meta(module: nn.Module, name: str, param: nn.Parameter) -> Any:
        return None if param.is_meta else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    with register_module_parameter_registration_hook(on_meta):
        yield


def repaired_generation_config(spec: ModelSpec, world: World) -> GenerationConfig | None:
    """Return the folder's generation settings if some had to be left out, which rank 0 logs; None if all can be read."""
    generation, left_out = read_generation_config(spec.folder)
    if world.is_main:
        for sentence in left_out:
            logger.warning(sentence)
    return generation if left_out else None


def give_generation_config(model: PreTrainedModel, spec: ModelSpec, world: World) -> None:
    """Give the model the folder's generation settings, as `from_pretrained` does."""
    if not model.can_generate():
        return
    if (repaired := repaired_generation_config(spec, world)) is not None:
        model.generation_config = repaired
    else:
        adjust_generation_config(model, str(spec.folder), spec.trust_remote_code)
