"""The parts of DeepSpeed outside of its public API that this package uses, listed in one place.

`check` runs before anything is built. If a DeepSpeed release has moved one of these parts, one error names it, and no model is
loaded wrongly. The accessors of `ds_*` attributes are in `shards.py`; the internals that they rely on are listed here.
"""

import inspect
from typing import Any

import deepspeed
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init

from zero_sft.errors import UnsupportedVersionError

TESTED = ("0.19.8",)

_INIT_METHODS = {
    "_post_init_method": ["self", "module"],
    "_zero_init_param": ["self", "param"],
    "_convert_to_deepspeed_param": ["self", "param"],
    "_aligned_size": ["self", "param"],
}


def check() -> None:
    """Check that DeepSpeed's internals are where this package needs them.

    Raises:
        UnsupportedVersionError: one is not; the error names the first.
    """
    for name, expected in _INIT_METHODS.items():
        method = getattr(Init, name, None)
        if method is None or list(inspect.signature(method).parameters) != expected:
            raise UnsupportedVersionError(_moved(f"zero.Init.{name}({', '.join(expected)})"), code="version.deepspeed_moved")
    if "tensor_overrides" not in inspect.signature(Init.__init__).parameters:
        raise UnsupportedVersionError(_moved("zero.Init's argument tensor_overrides"), code="version.deepspeed_moved")
    if not hasattr(DeepSpeedZeRoOffload, "setup_zero_stage3_hooks"):
        raise UnsupportedVersionError(_moved("DeepSpeedZeRoOffload.setup_zero_stage3_hooks"), code="version.deepspeed_moved")


def operator_builder() -> Any:
    """Return the class whose `jit_load(self, verbose)` compiles and imports an operator, for `operators.keep_operators_apart`.

    Raises:
        UnsupportedVersionError: the class lacks a method that this package needs.
    """
    has_methods = all(hasattr(OpBuilder, method) for method in ("jit_load", "sources", "deepspeed_src_path"))
    if not has_methods or list(inspect.signature(OpBuilder.jit_load).parameters) != ["self", "verbose"]:
        raise UnsupportedVersionError(_moved("OpBuilder.jit_load(self, verbose)"), code="version.deepspeed_moved")
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


def _moved(what: str) -> str:
    return (
        f"deepspeed {deepspeed.__version__} has moved {what}, which the sharded loader needs; tested: "
        f"{', '.join(TESTED)}. Install a tested release, or load with --loader stock."
    )
