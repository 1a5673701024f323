"""All uses of transformers' internals, collected in this one module.

Internals may change with any release. If a release has moved one, `check` raises one error with its name and the remedy
(`--loader stock`), instead of an ImportError in the middle of a load. For releases that are untested but intact, `untested`
returns a warning. A test scans the rest of the package for private names of transformers. Internals of the Trainer and of TRL
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

_MODULES = {
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "rename_source_key": "transformers.core_model_loading",
    "revert_weight_conversion": "transformers.core_model_loading",
    "build_glob_alternation": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "WeightConverter": "transformers.core_model_loading",
    "AutoHfQuantizer": "transformers.quantizers.auto",
    "AutoQuantizationConfig": "transformers.quantizers.auto",
    "get_keys_to_not_convert": "transformers.quantizers.base",
    "should_convert_module": "transformers.quantizers.quantizers_utils",
    "Fp8Dequantize": "transformers.integrations.finegrained_fp8",
    "LoadStateDictInfo": "transformers.modeling_utils",
    "meta_device_safe_creation_ops": "transformers.initialization",
    "no_tie_weights": "transformers.initialization",
    "guard_torch_init_functions": "transformers.initialization",
    "local_torch_dtype": "transformers.modeling_utils",
    "apply_patches": "transformers.modeling_utils",
    "ALL_ATTENTION_FUNCTIONS": "transformers.modeling_utils",
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
"""The key of a config's dict that holds the path from which it was read."""

_INITIALIZED = "_is_hf_initialized"
"""The attribute by which transformers marks tensors and modules as initialised."""

_ZERO3_CONFIG = "_hf_deepspeed_config_weak_ref"
"""The global of `transformers.integrations.deepspeed` that refers weakly to the active DeepSpeed config."""


def internal(name: str) -> Any:
    """Return the internal `name` of transformers.

    Raises:
        UnsupportedVersionError: this release does not have it in the expected module.
    """
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVersionError(_moved(f"{_MODULES[name]}.{name}"), code="version.transformers_moved") from error


def check() -> None:
    """Look up all internals at once, so that a moved one is found before anything is built.

    Raises:
        UnsupportedVersionError: an internal is missing; the message names the first one.
    """
    for name in _MODULES:
        internal(name)
    methods = [(transformers.PreTrainedModel, name) for name in _METHODS]
    for cls, name in (*methods, (transformers.GenerationMixin, "adjust_generation_fn")):
        if not hasattr(cls, name):
            raise UnsupportedVersionError(_moved(f"{cls.__name__}.{name}"), code="version.transformers_moved")


def tie_weights(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tie a model's weights; return the missing and unexpected names that remain by the model's rules."""
    info = internal("LoadStateDictInfo")(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def quantized_linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the linear modules that transformers would store in 4 bits, with their names: all but the output embeddings."""
    kept = [*internal("get_keys_to_not_convert")(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and internal("should_convert_module")(name, kept):
            yield name, module


def tied_names(model: Any) -> dict[str, str]:
    """Return the model's ties as `{target: source}`."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def drop_tie(model: Any, target: str) -> None:
    """Keep `target` as a separate tensor, as plain `from_pretrained` does if the checkpoint has different values for both."""
    del model.all_tied_weights_keys[target]


def names_not_saved(model: Any) -> set[str]:
    """Return the names of the state dict that `save_pretrained` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def patterns_not_missed(model: Any) -> list[str]:
    """Return patterns of the names that `from_pretrained` does not report as missing."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def set_weight_conversions(model: Any, rules: Iterable[Any]) -> None:
    """Set the conversion rules by which a model was loaded, as `from_pretrained` does; a save reverses them."""
    model._weight_conversions = list(rules)


def is_initialized(tensor: Any) -> bool:
    """Return whether a tensor is marked as initialised."""
    return bool(getattr(tensor, _INITIALIZED, False))


def mark_initialized(owner: Any) -> None:
    """Mark a tensor or a module as initialised, so that `_init_weights` skips it."""
    setattr(owner, _INITIALIZED, True)


def initialize_module(owner: Any, module: Any) -> None:
    """Run the model's initialisation of one module, and leave the module unmarked."""
    owner._initialize_weights(module, owner.is_custom_code())
    module.__dict__.pop(_INITIALIZED, None)


def model_mapping(auto: Any) -> Any:
    """Return an Auto class's mapping from config classes to model classes; None for other objects."""
    return getattr(auto, "_model_mapping", None)


def configured_attention(config: Any) -> str | None:
    """Return the attention that a config names."""
    return getattr(config, "_attn_implementation", None)


def attention_function(name: str) -> Any:
    """Return the function that computes an attention."""
    return internal("ALL_ATTENTION_FUNCTIONS")[name]


def replace_attention(name: str, function: Any) -> None:
    """Let all models of this process compute the attention of this name with another function."""
    internal("ALL_ATTENTION_FUNCTIONS")[name] = function


def set_attention(config: Any, name: str) -> None:
    """Set the attention that a model of this config uses."""
    config._attn_implementation = name


def check_attention(cls: Any, config: Any, name: str) -> None:
    """Let transformers check that a class can use an attention on this machine. Its exceptions are not wrapped.

    The check runs on an uninitialised object of the class: it looks at the class, the installed packages and the devices, but
    not at weights.
    """
    probe = object.__new__(cls)
    probe.__dict__["config"] = config
    probe._check_and_adjust_attn_implementation(name, is_init_check=True)


def supported_attentions(cls: Any) -> list[str]:
    """List the attentions that a model class declares, as text for a message."""
    declared = {
        "sdpa": cls._supports_sdpa,
        "flex_attention": cls._supports_flex_attn,
        "flash_attention_2, flash_attention_3 (with their packages, on GPUs)": cls._supports_flash_attn,
    }
    return ["eager", *(name for name, is_supported in declared.items() if is_supported)]


def adjust_generation_config(model: Any, folder: str, trust_remote_code: bool) -> None:
    """Set the generation settings of a folder on a model, as `from_pretrained` does."""
    model.adjust_generation_fn(
        None, False, None, folder, cache_dir=None, force_download=False, proxies=None, local_files_only=True, token=None,
        revision=None, subfolder="", trust_remote_code=trust_remote_code,
    )  # fmt: skip


def mark_as_read(generation: Any) -> None:
    """Mark generation settings as read from a file, as `from_pretrained` does, so that later changes are detected."""
    generation._original_object_hash = hash(generation)


def dequantize_function(operation: Any) -> Callable[..., torch.Tensor]:
    """Return the function by which an `Fp8Dequantize` operation applies scales to one tensor."""
    return operation._dequantize_one


def set_dequantize_function(operation: Any, function: Callable[..., torch.Tensor]) -> None:
    """Replace the function by which an `Fp8Dequantize` operation applies scales to one tensor."""
    operation._dequantize_one = function


def set_tokenizer_backend(tokenizer: Any, backend: Any) -> None:
    """Set the backend of a fast tokenizer, an object of the library `tokenizers`."""
    tokenizer._tokenizer = backend


def keep_zero3_enabled(model: Any, ds_config: Mapping[str, Any]) -> None:
    """Make transformers consider ZeRO-3 enabled for as long as the model lives.

    `generate` then keeps the ranks in step, and `resize_token_embeddings` gathers the embeddings that it changes. transformers
    keeps only a weak reference to the most recent config object. All models therefore hold the same one, so that ZeRO-3 stays
    enabled when the first model is deleted.
    """
    reference = getattr(_deepspeed_integration(), _ZERO3_CONFIG, None)
    active = reference() if reference is not None and internal("is_deepspeed_zero3_enabled")() else None
    model._zero_sft_hf_ds_config = active or internal("HfDeepSpeedConfig")(copy.deepcopy(dict(ds_config)))


@contextlib.contextmanager
def zero3_under(ds_config: Mapping[str, Any] | None) -> Iterator[None]:
    """Make transformers use this DeepSpeed config, whatever config other models were loaded with; None disables ZeRO-3.

    Some constructors build another model inside (`AutoModel.from_config`, as classification heads do). They would open a
    `zero.Init` there while any other model or `HfDeepSpeedConfig` is alive, and fail on the meta device.
    Afterwards the config that was active before, if any, is active again.
    """
    module = _deepspeed_integration()
    former = getattr(module, _ZERO3_CONFIG, None)
    active = None if ds_config is None else internal("HfDeepSpeedConfig")(copy.deepcopy(dict(ds_config)))  # is active from now
    if active is None:
        setattr(module, _ZERO3_CONFIG, None)
    try:
        yield
    finally:
        setattr(module, _ZERO3_CONFIG, former)
        del active


def _deepspeed_integration() -> Any:
    return importlib.import_module("transformers.integrations.deepspeed")


def kept_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """Return a function from a name to the dtype that this tensor keeps when the model is loaded in `dtype`; None if none."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: None
    pattern, kept, _ = internal("build_glob_alternation")(list(plan))

    def kept_dtype(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return plan[kept[match.lastgroup]] if match else None

    return kept_dtype


def untested() -> str | None:
    """Return a warning if this release was not tested with the package, else None."""
    if transformers.__version__ in TESTED:
        return None
    return f"transformers {transformers.__version__} is untested here; tested: {', '.join(TESTED)}."


def _moved(name: str) -> str:
    return (
        f"transformers {transformers.__version__} has moved {name}, which the sharded loader needs; tested with "
        f"{', '.join(TESTED)}. Install a tested release, or load with --loader stock."
    )
