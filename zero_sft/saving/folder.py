"""The folder that an export is written to: a hidden draft, which takes the target's place at the end.

Everything here runs on rank 0 and does not communicate.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.errors import ExportError

_WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?")
"""The files that a checkpoint of a model consists of, under the names that transformers writes."""


def require_writable(path: str | Path) -> None:
    """Raise `ExportError` now, rather than after the training, if the folder `path` can't be made or written. Rank 0."""
    target = Path(path)
    existed = target.exists()
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        probe = target / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        beside = target.parent / f".{target.name}.part"
        beside.mkdir(exist_ok=True)
        beside.rmdir()
        if not existed:
            target.rmdir()  # a run that fails now leaves nothing behind


class explained:
    """Turn an OSError into an ExportError that names the folder and the remedy."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ExportError(
                f"{self._target} can't be written: {error.strerror or error} ({error.filename}). Name another --output_dir, "
                "with room for the model, that all ranks share."
            ) from error


def put_in_place(draft: Path, target: Path) -> None:
    """Move the finished files into `target`: one rename where it is new, else file by file, the weights' index last."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)
        return
    fresh = sorted((each for each in draft.iterdir()), key=lambda each: (each.name == INDEX_FILE, each.name))
    names = {each.name for each in fresh}
    for each in fresh:
        if (target / each.name).is_dir():
            shutil.rmtree(target / each.name)
        each.replace(target / each.name)
    for old in target.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in names:
            old.unlink()
