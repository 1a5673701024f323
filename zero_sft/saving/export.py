"""A trained model as a plain Hugging Face checkpoint: the load run backwards, without a gather.

Every rank computes the same layout, under the names and shapes that plain `save_pretrained` gives: experts one by one, as
they were published. Rank 0 writes the headers, config and tokenizer; every rank plans the load of what it holds from those
files, and writes the bytes that it would read. All of it happens in a hidden folder beside the target, which takes its place
at the very end: a job that dies meanwhile leaves the target as it was.
"""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft import distributed
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.checkpoint.layout import MAX_FILE_BYTES, FileLayout, index_json, lay_out
from zero_sft.conversion.convert import Resolution, original_format, resolve
from zero_sft.distributed import agreed
from zero_sft.errors import ExportError
from zero_sft.plan.partition import whole_range
from zero_sft.plan.plan import Makeup, Target, pieces
from zero_sft.plan.regions import whole
from zero_sft.saving.folder import explained, put_in_place
from zero_sft.saving.settings import write_settings
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.writer import write_piece
from zero_sft.world import World
from zero_sft.zero import shards

logger = logging.getLogger(__name__)


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
    target = Path(path).expanduser()
    world = distributed.connect(World.detect())
    inner: Any = getattr(model, "module", model)
    tensors = dict(_tensors(inner))
    with agreed(world, f"checking {target}"):
        if world.is_main and target.exists() and not target.is_dir():
            raise ExportError(f"{target} is a file. Name a folder for the model.")
    layout = _lay_out(inner, tensors, max_file_bytes)
    files = layout.files
    draft = target.parent / f".{target.name}.part"
    try:
        with agreed(world, f"preparing {target}"), explained(target):
            if world.is_main:
                _prepare(draft, files, inner, tokenizer)
        with agreed(world, f"writing {target}"), explained(target):
            _write_own(draft, layout, tensors, world)
        with agreed(world, f"finishing {target}"), explained(target):
            if world.is_main:
                put_in_place(draft, target)
    finally:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)


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
    write_settings(draft, model, tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of an export, their tensors by name, and which of their elements each of the model's tensors becomes."""

    files: tuple[FileLayout, ...]
    stored: Mapping[str, StoredTensor]
    sources: Mapping[str, Makeup]


def _lay_out(model: PreTrainedModel, tensors: Mapping[str, Any], max_file_bytes: int) -> Layout:
    """The published format where it loads back as this model, element for element; else the model's own names."""
    state = {n: torch.empty(shards.full_shape(t), dtype=t.dtype, device="meta") for n, t in tensors.items()}
    try:
        published = _planned(original_format(model, state), max_file_bytes)
        resolution = resolve(model, state, published.stored)
        reason = _misfit(state, published.stored, resolution)
        if reason is None:
            return dataclasses.replace(published, sources=resolution.sources)
    except Exception as error:  # noqa: BLE001 - operations of any model; the training's result must not be lost for them
        reason = f"{type(error).__name__}: {error}"
    logger.warning("the model is written under its own names, not those of its published checkpoint (%s)", reason)
    own = _planned(state, max_file_bytes)
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    sources = {name: Makeup.of(name, shape, whole(name, shape)) for name, shape in shapes.items()}
    return dataclasses.replace(own, sources=sources)


def _planned(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> Layout:
    rows = ((name, STORED_DTYPES[each.dtype], tuple(each.shape)) for name, each in tensors.items())
    files = lay_out(rows, max_file_bytes)
    return Layout(files=files, stored={place.name: place for file in files for place in file.tensors}, sources={})


def _misfit(state: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor], resolution: Resolution) -> str | None:
    """Why files of this layout would not load back as the model, or None: every element of both must have its place."""
    absent = sorted(state.keys() - resolution.sources.keys())
    if absent or resolution.unexpected or resolution.mismatched:
        return (
            f"{', '.join([*absent, *sorted(resolution.unexpected)][:3]) or resolution.mismatched[0].name} would not load back"
        )
    written = Counter()
    for makeup in resolution.sources.values():
        for region in makeup.regions:
            written[region.source] += math.prod(region.sizes)
    partial = [name for name, each in stored.items() if written[name] != each.numel]
    return f"{partial[0]} would not be written wholly" if partial else None


def _write_own(folder: Path, layout: Layout, tensors: Mapping[str, Any], world: World) -> None:
    """Write this rank's range of every tensor; whole tensors are rank 0's."""
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in layout.files:
            handles[file.name] = os.open(folder / file.name, os.O_WRONLY)
            stack.callback(os.close, handles[file.name])
        for name, tensor in tensors.items():
            is_sharded = shards.is_sharded(tensor)
            if not is_sharded and not world.is_main:
                continue
            flat = shards.local_shard(tensor) if is_sharded else tensor.detach().contiguous().reshape(-1)
            span = shards.local_range(tensor) if is_sharded else whole_range(flat.numel())
            for piece in pieces(Target(makeup=layout.sources[name], span=span)):
                place = layout.stored[piece.source]
                write_piece(handles[place.file], folder / place.file, flat, piece, place.offset_bytes)
            if is_sharded:
                shards.release_shard(tensor)
        for handle in handles.values():
            os.fsync(handle)
