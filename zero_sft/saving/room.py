"""Check, before a run, that the disk has room for its checkpoints and its export.

The size of the export is exact except for some bytes of headers, for a model that loads with the ties of its class. If tied
weights of its checkpoint differ, the load keeps both, and the export is larger; buffers that the class does not save make it
smaller. The sizes of checkpoints are lower bounds.

Left out: quotas, which the file system does not report, and space that others take or free during the run.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from zero_sft.errors import ExportError
from zero_sft.loading import skeleton
from zero_sft.loading.request import ModelSpec
from zero_sft.paths import nearest_existing
from zero_sft.saving.export_layout import model_layout, published_layout
from zero_sft.saving.folder import resolved
from zero_sft.saving.run_record import ADAMW


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSizes:
    """Sizes that a run writes: bytes of the export and of one checkpoint, and the largest number of checkpoints at once."""

    export_bytes: int
    checkpoint_bytes: int
    checkpoints: int

    @property
    def nbytes(self) -> int:
        """The largest number of bytes on disk at one time."""
        return self.export_bytes + self.checkpoints * self.checkpoint_bytes


def export_sizes(spec: ModelSpec) -> tuple[int, int]:
    """Return the bytes of the exported weights and the number of parameter elements. Any rank; does not communicate."""
    model, state = skeleton.build_on_meta(spec)
    saved_state = skeleton.without_ties(model, state)
    layout, _ = published_layout(model, saved_state)
    numel = sum(param.numel() for param in skeleton.without_ties(model, dict(model.named_parameters())).values())
    return (layout or model_layout(saved_state)).nbytes, numel


def checkpoint_bytes(numel: int, optimizer: str) -> int:
    """Return the least bytes of DeepSpeed's states: fp32 weights and, for a `RunRecord`'s AdamW, two fp32 moments."""
    return numel * (12 if optimizer == ADAMW else 4)


def checkpoints_at_once(strategy: str, steps: int, save_steps: float, epochs: float, limit: int | None, first: int = 0) -> int:
    """Return the largest number of checkpoints that exist at the same time. Pure.

    With a limit, it is the limit plus one: the oldest checkpoint is removed after the newest was written.

    Args:
        strategy: the Trainer's `save_strategy`.
        steps: number of steps of the whole run.
        save_steps: steps between two saves; below 1, a fraction of the whole run.
        epochs: number of epochs of the whole run.
        limit: `save_total_limit`.
        first: the step at which a resumed run begins.
    """
    remaining = max(0, steps - first)
    if strategy == "no" or remaining == 0:
        return 0
    if strategy == "steps":
        interval = math.ceil(steps * save_steps) if save_steps < 1 else int(save_steps)
        saves = steps // interval - first // interval + (steps % interval != 0)
    elif strategy == "epoch":
        saves = math.ceil(epochs * remaining / steps)
    else:  # "best": at least one save
        saves = 1
    return saves if not limit or limit < 1 else min(saves, limit + 1)


def require_room(path: str | Path, sizes: SaveSizes, freed_bytes: int = 0) -> None:
    """Raise `ExportError` unless the file system of the folder `path` has room for a run. Rank 0.

    Args:
        freed_bytes: bytes that the run removes before it writes.
    """
    usage = shutil.disk_usage(nearest_existing(resolved(path)))
    free = usage.free + freed_bytes
    if usage.total == 0 or free >= sizes.nbytes:  # some network file systems report no sizes
        return
    fitting_checkpoints = (free - sizes.export_bytes) // max(1, sizes.checkpoint_bytes)
    checkpoints = f" and {sizes.checkpoints} checkpoints of {_size(sizes.checkpoint_bytes)} each" if sizes.checkpoints else ""
    remedy = ""
    if sizes.checkpoints and fitting_checkpoints >= 0:
        limit = fitting_checkpoints - 1
        remedy = f"give --save_total_limit {limit}, " if limit > 0 else "give --save_strategy no, "
    raise ExportError(
        f"--output_dir {path} has room for {_size(free)}, and this run needs {_size(sizes.nbytes)}: "
        f"{_size(sizes.export_bytes)} for the model{checkpoints}. Free some space, {remedy}or name another --output_dir.",
        code="export.no_room",
    )


def _size(nbytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:,} bytes"
