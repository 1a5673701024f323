"""Write a trained model as a plain Hugging Face checkpoint, without a gather: a load in reverse.

Every rank computes the same layout, with the names and shapes of plain `save_pretrained`: experts one by one, as they were
published. Rank 0 writes the headers, config and tokenizer. Every rank plans the load of its shards from these files, and writes
the bytes that it would read. All files are written to a hidden staging folder (`folder.py`), which takes the target's place at
the end (`placing.py`): a job that dies meanwhile leaves the target as it was.
"""

import contextlib
import hashlib
import logging
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES, FileLayout, index_json, lay_out
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import INDEX_FILE
from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.convert import Resolution, original_format, resolve
from zero_sft.errors import ExportError, NotPlacedError, ZeroSftError
from zero_sft.plan.partition import FlatRange, full_range
from zero_sft.plan.plan import SourceMap, copy_specs
from zero_sft.plan.regions import identity_regions
from zero_sft.printable import first_of
from zero_sft.saving.folder import explain_not_placed, explain_write_errors, find_staging, make_staging
from zero_sft.saving.placing import put_in_place
from zero_sft.saving.readable import require_readable, unwrapped
from zero_sft.saving.settings import write_settings
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.writer import write_copy
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
    """Write `model` (a loaded model, or a DeepSpeed engine around one) to the folder `path`. Every rank; communicates.

    All ranks must see `path` on one file system. Weights in the folder are replaced; its other files stay.

    Raises:
        ExportError: the folder can't be written, or is not the same on all ranks; or the export would not load as this model.
    """
    target = Path(path).expanduser()
    world = connect(World.detect())
    with collective_stage(world, "checking the model"):
        inner = unwrapped(model)
        tensors = dict(_tensors(inner))
        state = _on_meta(tensors)
        if world.is_main:
            require_readable(inner, state)
    layout = _choose_layout(inner, state, max_file_bytes, world)
    with contextlib.ExitStack() as cleanup:
        with collective_stage(world, f"preparing {target}") as exchange, explain_write_errors(target):
            exchange.must_match = ("files of the export", {"layout": layout.digest()})
            if world.is_main:
                staging = make_staging(target)
                cleanup.callback(shutil.rmtree, staging.folder, ignore_errors=True)
                exchange.local = staging.reference
        staging = find_staging(target, exchange.gathered[0])
        with collective_stage(world, f"preparing {target}"), explain_write_errors(target):
            if world.is_main:
                _prepare(staging.folder, layout.files, inner, tokenizer)
        with collective_stage(world, f"writing {target}"), explain_write_errors(target):
            _write_shards(staging.folder, layout, tensors, world)
        cleanup.pop_all()  # a complete export that can't take its place is kept
    with collective_stage(world, f"finishing {target}"), explain_not_placed(staging):
        if world.is_main:
            put_in_place(staging)


def _choose_layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World
) -> "ExportLayout":
    """Choose the published format if all ranks can write it, else the model's names. Every rank; communicates."""
    with collective_stage(world, "laying out the export") as exchange:
        published, exchange.local = published_layout(model, state, max_file_bytes)
    reason = next((reason for reason in exchange.gathered if reason is not None), None)
    if reason is None and published is not None:
        return published
    logger.warning("the model is written under its own names, not those of its published checkpoint (%s)", reason)
    return model_layout(state, max_file_bytes)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the state dict's parameters and persistent buffers, without names that a reader ties to a written one."""
    tied = set(tied_names(model))
    ignored = names_not_saved(model)
    written: set[int] = set()
    everything = list(model.state_dict(keep_vars=True).items())
    for name, tensor in sorted(everything, key=lambda item: item[0] in tied):
        if torch.is_tensor(tensor) and name not in ignored and not (name in tied and id(tensor) in written):
            written.add(id(tensor))
            yield name, tensor


def _on_meta(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors in full shapes, without data."""
    return {
        name: torch.empty(shards.current_shape(tensor), dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }


def _prepare(
    folder: Path, files: Sequence[FileLayout], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write everything except the weights: headers with space for the data after them, config, tokenizer. Rank 0."""
    for file in files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.nbytes)
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(index_json(files), encoding="utf-8")
    write_settings(folder, model, tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLayout:
    """The files of an export, and for each tensor of the model the stored elements that it consists of."""

    files: tuple[FileLayout, ...]
    sources: Mapping[str, SourceMap]

    @property
    def nbytes(self) -> int:
        """Total bytes of the files."""
        return sum(file.nbytes for file in self.files)

    def digest(self) -> str:
        """Hash every file's header and every element's position: equal on ranks that will write the same files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(repr((file.name, file.nbytes)).encode() + file.header)
        for name in sorted(self.sources):
            digest.update(repr((name, self.sources[name])).encode())
        return digest.hexdigest()


def published_layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[ExportLayout | None, str | None]:
    """Lay out the published format for a state dict on meta; or return None and the reason why it can't be used.

    It can be used if it loads back as this model, element for element. Any rank; does not communicate.
    """
    try:
        files = _lay_out_files(original_format(model, state), max_file_bytes)
        stored = _stored_tensors(files)
        resolution = resolve(model, state, stored)
        reason = _misfit(state, stored, resolution)
    except Exception as error:  # noqa: BLE001 - any model's operations run here; an error must not cost the trained weights
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (ExportLayout(files=files, sources=resolution.sources), None)


def model_layout(state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES) -> ExportLayout:
    """Lay out a state dict under the model's names. Any rank; does not communicate."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sources = {name: SourceMap.of(name, shape, identity_regions(name, shape)) for name, shape in shapes.items()}
    return ExportLayout(files=_lay_out_files(state, max_file_bytes), sources=sources)


def _lay_out_files(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> tuple[FileLayout, ...]:
    rows = ((name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    return lay_out(rows, max_file_bytes)


def _stored_tensors(files: Sequence[FileLayout]) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for file in files for tensor in file.tensors}


def _misfit(state: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor], resolution: Resolution) -> str | None:
    """Say why files of this layout would not load back as the model; None if every element of both has a counterpart."""
    missing = sorted(state.keys() - resolution.sources.keys())
    if missing or resolution.unexpected or resolution.mismatched:
        names = first_of([*missing, *sorted(resolution.unexpected)]) or resolution.mismatched[0].name
        return f"{names} would not load back"
    written = Counter()
    for source_map in resolution.sources.values():
        for region in source_map.regions:
            written[region.source] += math.prod(region.sizes)
    partial = [name for name, tensor in stored.items() if written[name] != tensor.numel]
    return f"{partial[0]} would not be written wholly" if partial else None


def _write_shards(folder: Path, layout: ExportLayout, tensors: Mapping[str, Any], world: World) -> None:
    """Write this rank's range of every tensor; rank 0 also writes the tensors that are not sharded."""
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in layout.files:
            handles[file.name] = os.open(folder / file.name, os.O_WRONLY)
            stack.callback(os.close, handles[file.name])
        written = {name: tensor for name, tensor in tensors.items() if world.is_main or shards.is_sharded(tensor)}
        total = sum(_local_range(tensor).numel * tensor.element_size() for tensor in written.values())
        task = stack.enter_context(progress.task("writing the model", total, progress.BYTES))
        stored_tensors = _stored_tensors(layout.files)
        for name, tensor in written.items():
            flat_range = _local_range(tensor)
            with _local_values(tensor) as values:
                flat = values.to(tensor.dtype)  # a shard keeps its dtype when a partitioned model is cast
                for copy in copy_specs(layout.sources[name], flat_range):
                    stored = stored_tensors[copy.source]
                    write_copy(handles[stored.file], folder / stored.file, flat, copy, stored.offset_bytes)
            task.advance(flat_range.numel * tensor.element_size())
        for handle in handles.values():
            os.fsync(handle)


def _local_range(tensor: Any) -> FlatRange:
    return shards.current_range(tensor) if shards.is_sharded(tensor) else full_range(tensor.numel())


def _local_values(tensor: Any) -> contextlib.AbstractContextManager[torch.Tensor]:
    if shards.is_sharded(tensor):
        return shards.current_values(tensor)
    return contextlib.nullcontext(tensor.detach().contiguous().reshape(-1))


def export_or_rescue(export: Callable[[Path], None], output: Path, world: World) -> None:
    """Export to `output`; if that fails, to a new folder in the working directory. Every rank; communicates.

    Args:
        export: writes the model to a folder; called on every rank.

    Raises:
        ExportError: `output` can't be written; the message names the folder that holds the model, if one does.
    """
    try:
        export(output)
    except NotPlacedError:
        raise
    except ExportError as error:
        token = broadcast_bytes(world, secrets.token_hex(4).encode() if world.is_main else None).decode()
        rescue = Path.cwd() / f"{output.name}-rescued-{token}"
        logger.error("%s\nwriting the model to %s instead", error, rescue)
        try:
            export(rescue)
        except ZeroSftError as rescue_error:
            logger.error("%s", rescue_error)
            raise error from None
        raise ExportError(f"{error}\nThe trained model is complete in {rescue}.", code=error.code) from error
