"""A trained model as a plain Hugging Face checkpoint: the load run backwards, without a gather.

Every rank computes the same layout, under the names and shapes that plain `save_pretrained` gives: experts one by one, as
they were published. Rank 0 writes the headers, config and tokenizer; every rank plans the load of what it holds from those
files, and writes the bytes that it would read. All of it happens in a hidden draft (`folder.py`), which takes the target's
place at the very end (`placing.py`): a job that dies meanwhile leaves the target as it was.
"""

import contextlib
import dataclasses
import hashlib
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

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES, FileLayout, index_json, lay_out
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.convert import Resolution, original_format, resolve
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import FillTarget, SourceMap, copy_specs
from zero_sft.plan.regions import identity_regions
from zero_sft.saving.folder import StagingFolder, explained, find_staging, kept, make_staging
from zero_sft.saving.placing import put_in_place
from zero_sft.saving.readable import require_readable, unwrapped
from zero_sft.saving.settings import write_settings
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.writer import write_piece
from zero_sft.transformers_internals import names_not_saved, tied_names
from zero_sft.zero import shards
from zero_sft.zero.process_group import connect

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
        ExportError: the folder can't be written, or is not the same on all ranks; or nobody would read the model back as it is.
    """
    target = Path(path).expanduser()
    world = connect(World.detect())
    with collective_stage(world, "checking the model"):
        inner = unwrapped(model)
        tensors = dict(_tensors(inner))
        if world.is_main:
            require_readable(inner, _on_meta(tensors))
    layout = _agreed_layout(inner, tensors, max_file_bytes, world)
    draft: StagingFolder | None = None
    is_complete = False
    try:
        with collective_stage(world, f"preparing {target}") as stage, explained(target):
            stage.must_match = ("files of the export", {"layout": layout.digest()})
            if world.is_main:
                draft = make_staging(target)
                stage.local = draft.reference
        draft = draft or find_staging(target, stage.gathered[0])
        with collective_stage(world, f"preparing {target}"), explained(target):
            if world.is_main:
                _prepare(draft.folder, layout.files, inner, tokenizer)
        with collective_stage(world, f"writing {target}"), explained(target):
            _write_own(draft.folder, layout, tensors, world)
        is_complete = True
        with collective_stage(world, f"finishing {target}"), kept(draft):
            if world.is_main:
                put_in_place(draft)
    finally:
        if world.is_main and draft is not None and not is_complete:
            shutil.rmtree(draft.folder, ignore_errors=True)


def _agreed_layout(model: PreTrainedModel, tensors: Mapping[str, Any], max_file_bytes: int, world: World) -> "ExportLayout":
    """The published format where every rank can write it, else the model's own names on every rank. Communicates."""
    state = _on_meta(tensors)
    with collective_stage(world, "laying out the export") as stage:
        published, stage.local = published_layout(model, state, max_file_bytes)
    reason = next((reason for reason in stage.gathered if reason is not None), None)
    if reason is None and published is not None:
        return published
    logger.warning("the model is written under its own names, not those of its published checkpoint (%s)", reason)
    return own_layout(state, max_file_bytes)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The state dict's parameters and persistent buffers; without the names that a reader ties to others which are written."""
    tied = set(tied_names(model))
    ignored = names_not_saved(model)
    written: set[int] = set()
    everything = list(model.state_dict(keep_vars=True).items())
    for name, tensor in sorted(everything, key=lambda item: item[0] in tied):
        if torch.is_tensor(tensor) and name not in ignored and not (name in tied and id(tensor) in written):
            written.add(id(tensor))
            yield name, tensor


def _on_meta(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors without data."""
    return {n: torch.empty(shards.current_shape(t), dtype=t.dtype, device="meta") for n, t in tensors.items()}


def _prepare(
    draft: Path, files: Sequence[FileLayout], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Everything but the weights' bytes: headers with room for the data behind them, config, tokenizer. Rank 0."""
    for file in files:
        with (draft / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.nbytes)
    if len(files) > 1:
        (draft / INDEX_FILE).write_text(index_json(files), encoding="utf-8")
    write_settings(draft, model, tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLayout:
    """The files of an export, their tensors by name, and which of their elements each of the model's tensors becomes."""

    files: tuple[FileLayout, ...]
    stored: Mapping[str, StoredTensor]
    sources: Mapping[str, SourceMap]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def digest(self) -> str:
        """A hash of every file's header and of every element's place: equal on ranks that will write the same files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(repr((file.name, file.nbytes)).encode() + file.header)
        for name in sorted(self.sources):
            digest.update(repr((name, self.sources[name])).encode())
        return digest.hexdigest()


def published_layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[ExportLayout | None, str | None]:
    """The files of the published format, for a state dict on meta; or None and the reason why it can't be used.

    It is used where it loads back as this model, element for element. Any rank; does not communicate.
    """
    try:
        published = _planned(original_format(model, state), max_file_bytes)
        resolution = resolve(model, state, published.stored)
        reason = _misfit(state, published.stored, resolution)
    except Exception as error:  # noqa: BLE001 - operations of any model; the training's result must not be lost for them
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (dataclasses.replace(published, sources=resolution.sources), None)


def own_layout(state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES) -> ExportLayout:
    """The files of a state dict under the model's own names. Any rank; does not communicate."""
    own = _planned(state, max_file_bytes)
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    sources = {name: SourceMap.of(name, shape, identity_regions(name, shape)) for name, shape in shapes.items()}
    return dataclasses.replace(own, sources=sources)


def _planned(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> ExportLayout:
    rows = ((name, STORED_DTYPES[each.dtype], tuple(each.shape)) for name, each in tensors.items())
    files = lay_out(rows, max_file_bytes)
    return ExportLayout(files=files, stored={place.name: place for file in files for place in file.tensors}, sources={})


def _misfit(state: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor], resolution: Resolution) -> str | None:
    """Why files of this layout would not load back as the model, or None: every element of both must have its place."""
    absent = sorted(state.keys() - resolution.sources.keys())
    if absent or resolution.unexpected or resolution.mismatched:
        return (
            f"{', '.join([*absent, *sorted(resolution.unexpected)][:3]) or resolution.mismatched[0].name} would not load back"
        )
    written = Counter()
    for source_map in resolution.sources.values():
        for region in source_map.regions:
            written[region.source] += math.prod(region.sizes)
    partial = [name for name, each in stored.items() if written[name] != each.numel]
    return f"{partial[0]} would not be written wholly" if partial else None


def _write_own(folder: Path, layout: ExportLayout, tensors: Mapping[str, Any], world: World) -> None:
    """Write this rank's range of every tensor; whole tensors are rank 0's."""
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in layout.files:
            handles[file.name] = os.open(folder / file.name, os.O_WRONLY)
            stack.callback(os.close, handles[file.name])
        total = sum(_own_bytes(tensor, world) for tensor in tensors.values())
        task = stack.enter_context(progress.task("writing the model", total, progress.BYTES))
        for name, tensor in tensors.items():
            is_sharded = shards.is_sharded(tensor)
            if not is_sharded and not world.is_main:
                continue
            span = shards.current_range(tensor) if is_sharded else full_range(tensor.numel())
            with shards.current_values(tensor) if is_sharded else _whole_values(tensor) as values:
                flat = values.to(tensor.dtype)  # a shard keeps its dtype when a partitioned model is cast
                for piece in copy_specs(FillTarget(source_map=layout.sources[name], flat_range=span)):
                    place = layout.stored[piece.source]
                    write_piece(handles[place.file], folder / place.file, flat, piece, place.offset_bytes)
            task.advance(_own_bytes(tensor, world))
        for handle in handles.values():
            os.fsync(handle)


@contextlib.contextmanager
def _whole_values(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor.detach().contiguous().reshape(-1)


def _own_bytes(tensor: Any, world: World) -> int:
    """What this rank writes of a tensor."""
    if shards.is_sharded(tensor):
        return shards.current_range(tensor).numel * tensor.element_size()
    return tensor.numel() * tensor.element_size() if world.is_main else 0
