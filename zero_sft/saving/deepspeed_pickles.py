"""Open DeepSpeed's checkpoint files without running code of theirs: only tensors, plain values and three known classes."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from zero_sft.errors import CheckpointError
from zero_sft.printable import first_of

_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum)

_NUMPY = frozenset({
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "numpy.dtypes.UInt32DType", "_codecs.encode",
})  # fmt: skip
"""Classes and functions in the state of numpy's random generator, which the Trainer's `rng_state_*.pth` holds."""

_KNOWN = frozenset(f"{cls.__module__}.{cls.__name__}" for cls in _CLASSES) | _NUMPY

_GETATTR = "builtins.getattr"
"""Some releases of Python 3.11 (3.11.2 of Debian 12) pickle a member of an enum as `getattr(class, name)`.
With other arguments it can lead to any function."""


def _enum_member(cls: Any, name: Any) -> ZeroStageEnum:
    """Return what `getattr` returns where a member of DeepSpeed's enum is asked for; refuse anything else."""
    if cls is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise TypeError(f"getattr of {name!r}")
    return ZeroStageEnum[name]


def load(path: Path) -> Any:
    """Return a file's contents. Its tensors are read from the disk when they are used.

    Raises:
        CheckpointError: it can't be read, or has objects of other classes.
    """
    require_known_classes(path)
    return _load(path)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([*_CLASSES, (_enum_member, _GETATTR)]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError and others
        raise CheckpointError(f"{path} can't be read: {error!s:.300}", code="checkpoint.unreadable_pickle") from error


def require_known_classes(path: Path) -> None:
    """Check that a file has only tensors, plain values and objects of known classes, without running its code.

    Raises:
        CheckpointError: it has others, or can't be read.
    """
    try:
        found: list[str] = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # as above
        raise CheckpointError(f"{path} can't be read: {error!s:.300}", code="checkpoint.unreadable_pickle") from error
    allowed = _KNOWN | _allowed_by_caller()
    unknown = [name for name in found if name not in allowed and not (name == _GETATTR and _only_members(path))]
    if unknown:
        raise CheckpointError(
            f"{path} has objects of classes that a checkpoint of DeepSpeed does not need, so it may run code when it is "
            f"opened: {first_of(sorted(unknown))}. If you trust its author, allow them: "
            "torch.serialization.add_safe_globals.",
            code="checkpoint.unknown_class",
        )


def _only_members(path: Path) -> bool:
    """Return whether every `getattr` in a file is that of an enum's member."""
    try:
        _load(path)
    except CheckpointError:
        return False
    return True


def _allowed_by_caller() -> set[str]:
    allowed = torch.serialization.get_safe_globals()
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in allowed if isinstance(cls, type)}
