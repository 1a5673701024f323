"""Every internal of transformers that this package uses, named in this one place.

Internals are not promised to stay. When a release has moved one, `check` raises one error that names it and the remedy
(`--loader stock`), instead of an ImportError in the middle of a load. For releases that are untested but intact, `untested`
returns a warning. A test scans the package for private names of transformers elsewhere. Internals of the Trainer and of TRL
are in `job/trainer_internals.py`.
"""

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers

from zero_sft.errors import UnsupportedVersionError

TESTED = ("5.23.0",)

_WANTED = {
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "rename_source_key": "transformers.core_model_loading",
    "revert_weight_conversion": "transformers.core_model_loading",
    "build_glob_alternation": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "WeightConverter": "transformers.core_model_loading",
    "SkipParameters": "transformers.core_model_loading",
    "AutoHfQuantizer": "transformers.quantizers.auto",
    "AutoQuantizationConfig": "transformers.quantizers.auto",
    "Fp8Dequantize": "transformers.integrations.finegrained_fp8",
    "LoadStateDictInfo": "transformers.modeling_utils",
    "meta_device_safe_creation_ops": "transformers.initialization",
    "no_tie_weights": "transformers.initialization",
    "guard_torch_init_functions": "transformers.initialization",
    "local_torch_dtype": "transformers.modeling_utils",
    "apply_patches": "transformers.modeling_utils",
    "patch_output_recorders": "transformers.modeling_utils",
    "_get_model_class": "transformers.models.auto.auto_factory",
    "get_class_from_dynamic_module": "transformers.dynamic_module_utils",
    "custom_object_save": "transformers.dynamic_module_utils",
    "HfDeepSpeedConfig": "transformers.integrations",
    "is_deepspeed_zero3_enabled": "transformers.integrations",
}

_METHODS = (
    "_get_dtype_plan", "_adjust_missing_and_unexpected_keys", "_initialize_weights",
    "_check_and_adjust_attn_implementation", "_supports_sdpa", "_supports_flex_attn", "_supports_flash_attn",
    "is_custom_code", "tie_weights", "get_parameter_or_buffer",
)  # fmt: skip

NAME_KEY = "_name_or_path"
"""The key under which a config's dict holds the path that it was read from."""

_INITIALIZED = "_is_hf_initialized"
"""The attribute of tensors and modules that have their values."""


def internal(name: str) -> Any:
    """The internal `name` of transformers.

    Raises:
        UnsupportedVersionError: this release does not have it where it was.
    """
    try:
        return getattr(importlib.import_module(_WANTED[name]), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVersionError(_moved(f"{_WANTED[name]}.{name}"), code="version.transformers_moved") from error


def check() -> None:
    """Look up everything at once, so that a moved internal is found before anything is built.

    Raises:
        UnsupportedVersionError: naming the first one that is gone.
    """
    for name in _WANTED:
        internal(name)
    for name in _METHODS:
        if not hasattr(transformers.PreTrainedModel, name):
            raise UnsupportedVersionError(_moved(f"PreTrainedModel.{name}"), code="version.transformers_moved")
    if not hasattr(transformers.GenerationMixin, "adjust_generation_fn"):
        raise UnsupportedVersionError(_moved("GenerationMixin.adjust_generation_fn"), code="version.transformers_moved")


def loading_info(missing: Iterable[str] = (), unexpected: Iterable[str] = ()) -> Any:
    """transformers' record of missing and unexpected names, which its methods read and refine."""
    return internal("LoadStateDictInfo")(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def tie_weights(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tie a model's weights; return the missing and unexpected names that remain by the model's own rules."""
    info = loading_info(missing, unexpected)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def tied_names(model: Any) -> dict[str, str]:
    """The model's ties, as `{target: source}`; the model's own dict, if it has one."""
    ties = getattr(model, "all_tied_weights_keys", None)
    return {} if ties is None else ties


def names_not_saved(model: Any) -> set[str]:
    """Names of the state dict that `save_pretrained` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def patterns_not_missed(model: Any) -> list[str]:
    """Patterns of names that `from_pretrained` does not report as missing."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def set_weight_conversions(model: Any, rules: Iterable[Any]) -> None:
    """Give a model the conversion rules by which it was loaded, as `from_pretrained` does; a save reverses them."""
    model._weight_conversions = list(rules)


def is_initialized(tensor: Any) -> bool:
    """Whether a tensor is marked as having its values."""
    return bool(getattr(tensor, _INITIALIZED, False))


def mark_initialized(owner: Any) -> None:
    """Mark a tensor or a module as having its values, so that `_init_weights` skips it."""
    setattr(owner, _INITIALIZED, True)


def initialize_module(owner: Any, module: Any) -> None:
    """Run the model's own initialisation of one module, and leave the module unmarked."""
    owner._initialize_weights(module, owner.is_custom_code())
    module.__dict__.pop(_INITIALIZED, None)


def model_mapping(auto: Any) -> Any:
    """The mapping from config classes to model classes of an Auto class; None for anything else."""
    return getattr(auto, "_model_mapping", None)


def configured_attention(config: Any) -> str | None:
    """The attention that a config names."""
    return getattr(config, "_attn_implementation", None)


def set_attention(config: Any, name: str) -> None:
    """Name the attention that a model of this config uses."""
    config._attn_implementation = name


def check_attention(cls: Any, config: Any, name: str) -> None:
    """Let transformers check that a class can use an attention here; raises its own exceptions.

    The check runs on an object of the class that was never initialised: it looks at the class, the installed packages and the
    devices, and at no weights.
    """
    probe = object.__new__(cls)
    probe.__dict__["config"] = config
    probe._check_and_adjust_attn_implementation(name, is_init_check=True)


def supported_attentions(cls: Any) -> list[str]:
    """The attentions that a model class declares, in words for a message."""
    declared = {
        "sdpa": cls._supports_sdpa,
        "flex_attention": cls._supports_flex_attn,
        "flash_attention_2, flash_attention_3 (with their packages, on GPUs)": cls._supports_flash_attn,
    }
    return ["eager", *(name for name, is_supported in declared.items() if is_supported)]


def adjust_generation_config(model: Any, folder: str, trust_remote_code: bool) -> None:
    """Give a model the generation settings of a folder, as `from_pretrained` does."""
    model.adjust_generation_fn(
        None, False, None, folder, cache_dir=None, force_download=False, proxies=None, local_files_only=True, token=None,
        revision=None, subfolder="", trust_remote_code=trust_remote_code,
    )  # fmt: skip


def mark_as_read(generation: Any) -> None:
    """Mark generation settings as they were read from a file, as `from_pretrained` does: a later change shows."""
    generation._original_object_hash = hash(generation)


def dequantize_function(operation: Any) -> Callable[..., torch.Tensor]:
    """The arithmetic of an `Fp8Dequantize` operation on one tensor and its scales."""
    return operation._dequantize_one


def set_dequantize_function(operation: Any, function: Callable[..., torch.Tensor]) -> None:
    """Replace the arithmetic of an `Fp8Dequantize` operation."""
    operation._dequantize_one = function


def set_tokenizer_backend(tokenizer: Any, backend: Any) -> None:
    """Give a fast tokenizer a backend of the library `tokenizers`."""
    tokenizer._tokenizer = backend


def zero3_config(ds_config: Mapping[str, Any]) -> Any:
    """What tells transformers that ZeRO-3 is on, for as long as somebody holds it: the one that does already, or a new one.

    transformers keeps a weak reference to the last one made; so each model holds the same one, and the first model's end is
    not the end of the others'.
    """
    module = importlib.import_module("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    active = reference() if reference is not None and internal("is_deepspeed_zero3_enabled")() else None
    return active or internal("HfDeepSpeedConfig")(copy.deepcopy(dict(ds_config)))


@contextlib.contextmanager
def zero3_under(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Let `from_pretrained` build under this DeepSpeed config, whichever config another model was loaded under.

    Afterwards the one that was active before is active again, or that of `zero3_config`.
    """
    module: Any = importlib.import_module("transformers.integrations.deepspeed")
    before = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    held = internal("HfDeepSpeedConfig")(copy.deepcopy(dict(ds_config)))
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = before
        del held


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers take ZeRO-3 for switched off.

    A model that builds another inside its constructor (`AutoModel.from_config`, as classification heads do) would open a
    `zero.Init` there as long as any other model or `HfDeepSpeedConfig` is alive, and fail on the meta device.
    """
    module: Any = importlib.import_module("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    module._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = reference


def kept_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """A function that tells which dtype a tensor of that name keeps though the model is loaded in `dtype`; None: no other."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: None
    pattern, kept, _ = internal("build_glob_alternation")(list(plan))

    def kept_dtype(name: str) -> torch.dtype | None:
        found = pattern.search(name)
        return plan[kept[found.lastgroup]] if found else None

    return kept_dtype


def untested() -> str | None:
    """A warning for a release that this package was not tested with, or None."""
    if transformers.__version__ in TESTED:
        return None
    return f"transformers {transformers.__version__} is untested here; tested: {', '.join(TESTED)}."


def _moved(what: str) -> str:
    return (
        f"transformers {transformers.__version__} has moved {what}, which the sharded loader needs; tested with "
        f"{', '.join(TESTED)}. Install a tested release, or load with --loader stock."
    )
