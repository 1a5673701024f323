"""Does what a run will write fit on the disk?

The sizes of the export are those of its files, up to some bytes of headers. Those of checkpoints are lower bounds.

Left out: quotas, which the file system does not tell, and space that others will take or free meanwhile.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from zero_sft.errors import ExportError
from zero_sft.loading import skeleton
from zero_sft.loading.request import ModelSpec
from zero_sft.saving.export import own_layout, published_layout
from zero_sft.saving.folder import resolved
from zero_sft.transformers_internals import tied_names

_MASTER_BYTES = 4
"""Of each trained element, in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSizes:
    """Bytes that a run writes: the export, one checkpoint, and how many of these are there at once."""

    export_bytes: int
    checkpoint_bytes: int
    checkpoints: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, at the moment when it is most."""
        return self.export_bytes + self.checkpoints * self.checkpoint_bytes


def sizes_of(spec: ModelSpec) -> tuple[int, int]:
    """Bytes of the exported weights, and the elements of the model's parameters. One rank; does not communicate."""
    model, state = skeleton.build_on_meta(spec)
    tied = tied_names(model)
    saved = {name: tensor for name, tensor in state.items() if name not in tied}
    layout, _ = published_layout(model, saved)
    numel = sum(param.numel() for name, param in model.named_parameters() if name not in tied)
    return (layout or own_layout(saved)).nbytes, numel


def checkpoint_bytes(numel: int, state_bytes: int) -> int:
    """Bytes of DeepSpeed's states: weights in fp32, and what the optimizer keeps of each element."""
    return numel * (_MASTER_BYTES + state_bytes)


def checkpoints_at_once(strategy: str, steps: int, save_steps: float, epochs: float, limit: int | None, first: int = 0) -> int:
    """How many checkpoints stand side by side at most. Pure.

    With a limit it is one more: the oldest is removed after the newest was written.

    Args:
        strategy: the Trainer's `save_strategy`.
        steps: of the whole run.
        save_steps: steps between two saves; below 1, a part of the whole run.
        epochs: of the whole run.
        limit: `save_total_limit`.
        first: the step that a resumed run begins with.
    """
    left = max(0, steps - first)
    if strategy == "no" or left == 0:
        return 0
    if strategy == "steps":
        between = math.ceil(steps * save_steps) if save_steps < 1 else int(save_steps)
        saves = steps // between - first // between + (steps % between != 0)
    elif strategy == "epoch":
        saves = math.ceil(epochs * left / steps)
    else:  # "best": at least one
        saves = 1
    return saves if not limit or limit < 1 else min(saves, limit + 1)


def require_room(path: str | Path, sizes: SaveSizes, freed_bytes: int = 0) -> None:
    """Raise `ExportError` unless the file system of the folder `path` has room for a run. Rank 0.

    Args:
        freed_bytes: what the run removes before it writes.
    """
    folder = resolved(path)
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free + freed_bytes
    if usage.total == 0 or free >= sizes.nbytes:  # some network file systems tell nothing
        return
    fitting = (free - sizes.export_bytes) // max(1, sizes.checkpoint_bytes)
    checkpoints = f" and {sizes.checkpoints} checkpoints of {_shown(sizes.checkpoint_bytes)} each" if sizes.checkpoints else ""
    remedy = ""
    if sizes.checkpoints and fitting >= 0:
        remedy = f"give --save_total_limit {fitting - 1}, " if fitting > 1 else "give --save_strategy no, "
    raise ExportError(
        f"--output_dir {path} has room for {_shown(free)}, and this run needs {_shown(sizes.nbytes)}: "
        f"{_shown(sizes.export_bytes)} for the model{checkpoints}. Free some, {remedy}or name another --output_dir.",
        code="export.no_room",
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder. Rank 0."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _shown(nbytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:,} bytes"


def state_bytes_of(optimizer: str) -> int:
    """Bytes that an optimizer keeps of each element at least: two moments in fp32 for Adam's kind, else nothing is known."""
    known = optimizer.lower().replace("_", "")
    return 8 if known in ("adam", "adamw", "adamwtorch", "adamwtorchfused", "fusedadam", "deepspeedcpuadam") else 0
