"""Features of DeepSpeed that this package does not train with, and settings that contradict ZeRO-3. Pure.

DeepSpeed would meet most of them only when its engine starts, after the weights are loaded, or would train otherwise than the
config says. `python -m tests.compatibility` tries what is not listed here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zero_sft.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Feature:
    """A key that turns on a feature.

    Attributes:
        key: with the names of its sections.
        is_on: tells whether a value turns it on.
        reason: why it is refused.
    """

    key: str
    is_on: Callable[[Any], bool]
    reason: str


def _is_many(value: Any) -> bool:
    return isinstance(value, int) and value > 1


_SPLIT = "this package trains with ZeRO-3 alone: each rank holds a part of every parameter and trains on its own samples"

_UNSUPPORTED = (
    _Feature(key="tensor_parallel.autotp_size", is_on=_is_many, reason=_SPLIT),
    _Feature(key="tensor_parallel.tp.tp_size", is_on=_is_many, reason=_SPLIT),
    _Feature(
        key="sequence_parallel_size", is_on=_is_many, reason="the job shares sequences with --sequence_parallel_size instead"
    ),
    _Feature(key="expert_parallel.enabled", is_on=bool, reason=_SPLIT),
    _Feature(
        key="compile.deepcompile",
        is_on=bool,
        reason="DeepCompile has no effect until engine.compile() is called, which no trainer does, and is untested here",
    ),
    _Feature(
        key="zero_optimization.zenflow",
        is_on=lambda value: value is not None,
        reason="ZenFlow is untested here: in DeepSpeed 0.19 its second step fails on CPU ranks",
    ),
    _Feature(
        key="zero_optimization.offload_optimizer.super_offload",
        is_on=bool,
        reason="SuperOffload needs CUDA and is untested here",
    ),
    _Feature(key="hybrid_engine.enabled", is_on=bool, reason="the hybrid engine is for DeepSpeed-Chat and is untested here"),
    _Feature(key="data_efficiency.enabled", is_on=bool, reason="batches are made here, not by DeepSpeed, so it has no effect"),
    _Feature(key="weight_quantization", is_on=bool, reason="it is for inference"),
)


def refused_features(config: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield an error for each feature that a stage-3 config turns on and that is refused."""
    for feature in _UNSUPPORTED:
        value = _value(config, feature.key)
        if feature.is_on(value):
            yield ConfigError(
                f"{feature.key} is {value!r:.80}, but {feature.reason}. Remove the key.", code="ds_config.unsupported_feature"
            )


def contradictions(config: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield an error for each combination of settings with which DeepSpeed's engine would not start."""
    if _value(config, "zero_optimization.reduce_scatter") is not False:
        optimizer = str(_value(config, "optimizer.type") or "")
        for name, is_set in (
            ("prescale_gradients", bool(config.get("prescale_gradients"))),
            ("gradient_predivide_factor", (config.get("gradient_predivide_factor") or 1.0) != 1.0),
            (f"optimizer.type {optimizer}", optimizer.lower() == "muon"),
        ):
            if is_set:
                yield ConfigError(
                    f"{name} can't be used while ZeRO-3 reduces gradients with reduce_scatter. Set "
                    "zero_optimization.reduce_scatter to false, or remove it.",
                    code="ds_config.contradiction",
                )


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key with the names of its sections; None if it is absent."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
