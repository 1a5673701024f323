"""Every internal of transformers that this package uses, imported in this one place.

Internals are not promised to stay. When a release has moved one, importing this module raises one error that names it and
the way back (`--loader stock`), instead of an ImportError out of the middle of a load. Untested but intact releases get a
warning from `warn_if_untested`.
"""

import contextlib
import copy
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers

from zero_sft.errors import UnsupportedVersionError

logger = logging.getLogger(__name__)

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
    "tie_weights", "get_parameter_or_buffer",
)  # fmt: skip


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


def loading_info(missing: Iterable[str], unexpected: Iterable[str]) -> Any:
    """transformers' own record of missing and unexpected names, for its methods that refine it."""
    return internal("LoadStateDictInfo")(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


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
