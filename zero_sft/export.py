"""A trained model as a plain Hugging Face checkpoint: the load run backwards, without a gather.

Every rank computes the same layout; rank 0 writes the headers, config and tokenizer; every rank writes the bytes of its own
shards at their offsets. All of it happens in a hidden folder beside the target, which takes its place at the very end: a
job that dies meanwhile leaves the target as it was.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft import distributed
from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.checkpoint.layout import MAX_FILE_BYTES, FileLayout, index_json, lay_out
from zero_sft.distributed import World, agreed
from zero_sft.errors import ExportError
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.writer import write_at
from zero_sft.zero import shards

_STALE = ("model*.safetensors", INDEX_FILE, "pytorch_model*.bin", "pytorch_model.bin.index.json")


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `model` (a loaded model, or a DeepSpeed engine over one) to the folder `path`. Every rank; communicates.

    All ranks must see `path` on one file system. What else the folder holds stays; former weights in it are replaced.

    Raises:
        ExportError: the folder can't be written, or is not the same on all ranks.
    """
    target = Path(path)
    world = World.detect()
    distributed.connect(world)
    inner: Any = getattr(model, "module", model)
    tensors = dict(_tensors(inner))
    with agreed(world, f"checking {target}"):
        if world.is_main and target.exists() and not target.is_dir():
            raise ExportError(f"{target} is a file. Name a folder for the model.")
    files = lay_out(((n, STORED_DTYPES[t.dtype], shards.full_shape(t)) for n, t in tensors.items()), max_file_bytes)
    draft = target.parent / f".{target.name}.part"
    try:
        with agreed(world, f"preparing {target}"), _explained(target):
            if world.is_main:
                _prepare(draft, files, inner, tokenizer)
        with agreed(world, f"writing {target}"), _explained(target):
            for file in files:
                _write_own(draft / file.name, file, tensors, world)
        with agreed(world, f"finishing {target}"), _explained(target):
            if world.is_main:
                _put_in_place(draft, target)
    finally:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)


def require_writable(path: str | Path) -> None:
    """Raise `ExportError` now, rather than after the training, if the folder `path` can't be made or written. Rank 0."""
    target = Path(path)
    existed = target.exists()
    with _explained(target):
        target.mkdir(parents=True, exist_ok=True)
        probe = target / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        beside = target.parent / f".{target.name}.part"
        beside.mkdir(exist_ok=True)
        beside.rmdir()
        if not existed:
            target.rmdir()  # a run that fails now leaves nothing behind


class _explained:
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


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The state dict's parameters and persistent buffers, a shared one once, under the name that it is loaded by."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    seen: set[int] = set()
    everything = list(model.state_dict(keep_vars=True).items())
    for name, tensor in sorted(everything, key=lambda item: item[0] in tied):
        if torch.is_tensor(tensor) and id(tensor) not in seen and name not in ignored:
            seen.add(id(tensor))
            yield name, tensor


def _prepare(
    draft: Path, files: Sequence[FileLayout], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Everything but the weights' bytes: headers with room for the data behind them, config, tokenizer. Rank 0."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in files:
        with (draft / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.nbytes)
    if len(files) > 1:
        (draft / INDEX_FILE).write_text(index_json(files), encoding="utf-8")
    model.config.save_pretrained(draft)
    if model.can_generate():
        model.generation_config.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)


def _write_own(path: Path, file: FileLayout, tensors: Mapping[str, Any], world: World) -> None:
    """Write this rank's range of every tensor in one file; whole tensors are rank 0's."""
    handle = os.open(path, os.O_WRONLY)
    try:
        for place in file.tensors:
            tensor = tensors[place.name]
            if shards.is_sharded(tensor):
                start = shards.local_range(tensor).start
                write_at(handle, path, shards.local_shard(tensor), place.offset_bytes + start * place.itemsize)
                shards.release_shard(tensor)
            elif world.is_main:
                write_at(handle, path, tensor.detach().contiguous().reshape(-1), place.offset_bytes)
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(draft: Path, target: Path) -> None:
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
    for pattern in _STALE:
        for old in target.glob(pattern):
            if old.name not in names:
                old.unlink()
