"""Find the classes of the optimizers and schedules that a DeepSpeed config can name, and the settings that they take."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch


def optimizer_class(kind: str) -> Any:
    """Return a class of torch with the settings of DeepSpeed's optimizer `kind`, or None if there is none.

    AdamW stands in for optimizers of DeepSpeed that torch lacks or defines with other settings.
    """
    stand_ins = {"adam": "AdamW", "adamw": "AdamW", "adagrad": "Adagrad", "lion": "AdamW", "lamb": "AdamW", "muon": "AdamW"}
    return getattr(torch.optim, stand_ins.get(kind.lower(), kind), None)


def scheduler_class(kind: Any) -> Any:
    """Return DeepSpeed's or torch's class of the learning-rate schedule `kind`, or None if neither has it."""
    from deepspeed.runtime import lr_schedules

    if not isinstance(kind, str):
        return None
    deepspeed_class = getattr(lr_schedules, kind, None) if kind in lr_schedules.VALID_LR_SCHEDULES else None
    return deepspeed_class or getattr(torch.optim.lr_scheduler, kind, None)


def scheduler_settings(section: Any) -> list[str]:
    """Return the names of the settings that the schedule of a `scheduler` section accepts; empty if there is no schedule."""
    cls = scheduler_class(section.get("type")) if isinstance(section, Mapping) else None
    return [] if cls is None else parameter_names(cls)


def parameter_names(cls: Any) -> list[str]:
    """Return the names of a constructor's parameters, without `self`, `params` and `optimizer`."""
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "params", "optimizer")]
