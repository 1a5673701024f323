"""The counters of a DeepSpeed engine, its loss scaler and its optimizer's groups, as JSON. Nothing here communicates."""

from collections.abc import Mapping
from typing import Any

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")

_FROM_ARGUMENTS = frozenset({"params", "lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "maximize", "foreach"})
"""Values of an optimizer's group that a run takes from its arguments, not from a checkpoint."""


def engine_state(engine: Any) -> dict[str, Any]:
    """Return an engine's state, apart from weights, optimizer's states and schedule."""
    groups = [
        {key: value for key, value in group.items() if key not in _FROM_ARGUMENTS and isinstance(value, (int, float))}
        for group in engine.optimizer.optimizer.param_groups
    ]
    return {"counters": {name: getattr(engine, name) for name in _COUNTERS}, "loss_scaler": _scaler(engine), "groups": groups}


def restore_engine_state(engine: Any, state: Mapping[str, Any]) -> None:
    """Give an engine the state that `engine_state` returned. Its steps may have another number of batches and samples."""
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    for name in _scaler(engine).keys() & state["loss_scaler"].keys():
        setattr(engine.optimizer.loss_scaler, name, state["loss_scaler"][name])
    for group, saved in zip(engine.optimizer.optimizer.param_groups, state["groups"], strict=False):
        group.update({key: value for key, value in saved.items() if key in group})


def step_was_skipped(engine: Any) -> bool:
    """Return whether the optimizer has left out the last step, since its gradient was not finite; the same on every rank.

    With fp16, this happens in every run: the loss scale is then lowered.
    """
    return bool(engine.optimizer.overflow)


def uses_loss_scale(engine: Any) -> bool:
    """Return whether gradients may overflow because of their scale alone (fp16)."""
    return bool(engine.fp16_enabled())


def _scaler(engine: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(engine.optimizer.loss_scaler).items() if isinstance(value, (int, float))}
