"""The classes and functions of DeepSpeed outside of its public API that this package uses.

`check` runs before a model is built, `operator_builder` before an operator is compiled. If a DeepSpeed release has moved one of
these parts, one error names it, and no model is loaded wrongly. `set_optimizer_defaults` mends an object of DeepSpeed.

Left out: attributes and methods of ZeRO parameters, which `shards.py` and `gather_hooks.py` use, and the config parser's
classes and tables, which `ds_schema.py` uses.
"""

import inspect
from typing import Any

import deepspeed
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups

from zero_sft.errors import UnsupportedVersionError

TESTED = ("0.19.8",)

_INIT_METHODS = {"_post_init_method": ["self", "module"], "_convert_to_deepspeed_param": ["self", "param"]}


def check() -> None:
    """Check that DeepSpeed's internals are where this package needs them.

    Raises:
        UnsupportedVersionError: one is not; the error names the first.
    """
    for name, expected in _INIT_METHODS.items():
        method = getattr(Init, name, None)
        _require(method is not None and _parameters(method) == expected, f"zero.Init.{name}({', '.join(expected)})")
    _require("tensor_overrides" in _parameters(Init.__init__), "zero.Init's argument tensor_overrides")
    _require(hasattr(groups, "_get_zero_param_intra_parallel_group"), "groups._get_zero_param_intra_parallel_group")
    _require(hasattr(DeepSpeedZeRoOffload, "setup_zero_stage3_hooks"), "DeepSpeedZeRoOffload.setup_zero_stage3_hooks")


def operator_builder() -> Any:
    """Return the class whose `jit_load(self, verbose)` compiles and imports an operator, for `install_operator_builder`.

    Raises:
        UnsupportedVersionError: the class lacks a method that this package needs.
    """
    has_methods = all(hasattr(OpBuilder, method) for method in ("jit_load", "sources", "deepspeed_src_path"))
    _require(has_methods and _parameters(OpBuilder.jit_load) == ["self", "verbose"], "OpBuilder.jit_load(self, verbose)")
    return OpBuilder


def set_optimizer_defaults(optimizer: Any) -> None:
    """Copy `defaults` from the inner optimizer to DeepSpeed's ZeRO optimizer, which accelerate may have wrapped."""
    outer = getattr(optimizer, "optimizer", optimizer)
    inner: Any = getattr(outer, "optimizer", None)
    if not hasattr(outer, "defaults") and hasattr(inner, "defaults"):
        outer.defaults = inner.defaults


def untested() -> str | None:
    """Return a warning if this package was not tested with the installed DeepSpeed release, else None."""
    version = deepspeed.__version__.split("+")[0]
    return None if version in TESTED else f"deepspeed {version} is untested here; tested: {', '.join(TESTED)}."


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _require(is_there: bool, what: str) -> None:
    if not is_there:
        raise UnsupportedVersionError(
            f"deepspeed {deepspeed.__version__} has moved {what}, which the sharded loader needs; tested: "
            f"{', '.join(TESTED)}. Install a tested release, or load with --loader stock.",
            code="version.deepspeed_moved",
        )
