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
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES, FileLayout, lay_out
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.convert import Resolution, published_format, resolve
from zero_sft.errors import ExportError, NotPlacedError, ZeroSftError
from zero_sft.options.keywords import require_instance, require_path, wrong_value
from zero_sft.plan.plan import SourceMap
from zero_sft.plan.regions import identity_regions
from zero_sft.printable import first_of
from zero_sft.saving import weight_files
from zero_sft.saving.folder import explain_not_placed, explain_write_errors, find_staging, make_staging
from zero_sft.saving.gathered_parts import write_gathered
from zero_sft.saving.placing import put_in_place, require_replaceable
from zero_sft.saving.readable import require_loads_back, unwrapped
from zero_sft.saving.settings import write_settings
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.transformers_internals import names_not_saved, tied_names
from zero_sft.zero import shards
from zero_sft.zero.process_group import connect

logger = logging.getLogger(__name__)


@cpu_by_default()
def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `model` (a loaded model, or a DeepSpeed engine around one) to the folder `path`. Every rank; communicates.

    If not all ranks see `path` on one file system, rank 0 writes the whole model. Weights in the folder are replaced; its other
    files stay.

    Raises:
        ExportError: the folder can't be written, or the export would not load as this model.
        ArgumentError: an argument has another type or is out of range.
    """
    world = connect(World.detect())
    with collective_stage(world, "checking the model"):
        if path == "":  # as a path, it would be the working directory
            raise ExportError(
                "the folder to save the model to is empty: check that its variable is set.", code="export.no_folder_named"
            )
        target = Path(require_path("path", path, "text or a path: the folder to write to")).expanduser()
        require_instance("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers, or None")
        if type(max_file_bytes) is not int or max_file_bytes < 1:
            raise wrong_value("max_file_bytes", max_file_bytes, "a whole number of bytes, at least 1")
        inner = unwrapped(model)
        tensors = weights_to_save(inner)
        state = on_meta(tensors)
        if world.is_main:
            require_loads_back(inner, state)
    layout = choose_layout(inner, state, max_file_bytes, world)
    with contextlib.ExitStack() as cleanup:
        with collective_stage(world, f"making a staging folder for {target}") as exchange, explain_write_errors(target):
            exchange.must_match = ("files of the export", {"layout": layout.digest()})
            if world.is_main:
                staging = make_staging(target)
                cleanup.callback(shutil.rmtree, staging.folder, ignore_errors=True)
                exchange.local = staging.reference
        staging = find_staging(target, exchange.gathered[0])
        with collective_stage(world, f"preparing {target}"), explain_write_errors(target):
            if world.is_main:
                weight_files.write_headers(staging.folder, layout.files)
                for name, content in weight_files.index_file(layout.files).items():
                    (staging.folder / name).write_bytes(content)
                write_settings(staging.folder, inner, tokenizer)
                require_replaceable(staging.target, {path.name for path in staging.folder.iterdir()})
        with collective_stage(world, f"looking for {staging.folder.name}") as exchange:
            exchange.local = staging.folder.is_dir()
        _write_weights(staging.folder, target, layout, tensors, world, is_shared=all(exchange.gathered))
        cleanup.pop_all()  # a complete export that can't take its place is kept
    with collective_stage(world, f"finishing {target}"), explain_not_placed(staging):
        if world.is_main:
            put_in_place(staging)


def _write_weights(
    folder: Path, target: Path, layout: "ExportLayout", tensors: Mapping[str, Any], world: World, *, is_shared: bool
) -> None:
    """Write the weights into files that have their headers. Every rank; communicates."""
    if is_shared:
        total = weight_files.part_nbytes(tensors, is_main=world.is_main)
        with (
            collective_stage(world, f"writing {target}", timeout_for_bytes(layout.nbytes)),
            explain_write_errors(target),
            progress.task("writing the model", total, progress.BYTES) as task,
        ):
            parts = weight_files.weight_parts(tensors, is_main=world.is_main)
            weight_files.write_parts(folder, layout.files, layout.source_maps, parts, advance=task.advance)
        return
    if world.is_main:
        logger.info("not all ranks see %s: rank 0 writes the whole model", target)
    with progress.task("writing the model", layout.nbytes, progress.BYTES) as task:
        write_gathered(folder, target, layout.files, layout.source_maps, tensors, world, task.advance)


def choose_layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World
) -> "ExportLayout":
    """Choose the published format (see `published_format`) if all ranks can write it, else the model's names.

    Every rank; communicates.
    """
    with collective_stage(world, "laying out the export") as exchange:
        published, exchange.local = published_layout(model, state, max_file_bytes)
    reason = next((reason for reason in exchange.gathered if reason is not None), None)
    if reason is None and published is not None:
        return published
    logger.warning("the model is written under its own names, not those of its published checkpoint (%s)", reason)
    return model_layout(state, max_file_bytes)


def weights_to_save(model: nn.Module) -> dict[str, Any]:
    """Return the state dict's parameters and persistent buffers, without names that a reader ties to a written one."""
    tied = set(tied_names(model))
    ignored = names_not_saved(model)
    written: set[int] = set()
    tensors: dict[str, Any] = {}
    everything = list(model.state_dict(keep_vars=True).items())
    for name, tensor in sorted(everything, key=lambda item: item[0] in tied):
        if torch.is_tensor(tensor) and name not in ignored and not (name in tied and id(tensor) in written):
            written.add(id(tensor))
            tensors[name] = tensor
    return tensors


def on_meta(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors in full shapes, without data."""
    return {
        name: torch.empty(shards.current_shape(tensor), dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLayout:
    """The files of an export, and for each tensor of the model the stored elements that it consists of."""

    files: tuple[FileLayout, ...]
    source_maps: Mapping[str, SourceMap]

    @property
    def nbytes(self) -> int:
        """Total bytes of the files."""
        return sum(file.nbytes for file in self.files)

    def digest(self) -> str:
        """Hash every file's header and every element's position: equal on ranks that will write the same files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(repr((file.name, file.nbytes)).encode() + file.header)
        for name in sorted(self.source_maps):
            digest.update(repr((name, self.source_maps[name])).encode())
        return digest.hexdigest()


def published_layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[ExportLayout | None, str | None]:
    """Lay out the published format for a state dict on meta; or return None and the reason why it can't be used.

    It can be used if it loads back as this model, element for element. Any rank; does not communicate.
    """
    try:
        files = _lay_out_files(published_format(model, state), max_file_bytes)
        stored = _stored_tensors(files)
        resolution = resolve(model, state, stored)
        reason = _misfit(state, stored, resolution)
    except Exception as error:  # noqa: BLE001 - any model's operations run here; an error must not cost the trained weights
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (ExportLayout(files=files, source_maps=resolution.source_maps), None)


def model_layout(state: Mapping[str, torch.Tensor], max_file_bytes: int = MAX_FILE_BYTES) -> ExportLayout:
    """Lay out a state dict under the model's names. Any rank; does not communicate."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    source_maps = {name: SourceMap.of(name, shape, identity_regions(name, shape)) for name, shape in shapes.items()}
    return ExportLayout(files=_lay_out_files(state, max_file_bytes), source_maps=source_maps)


def _lay_out_files(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> tuple[FileLayout, ...]:
    rows = ((name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    return lay_out(rows, max_file_bytes)


def _stored_tensors(files: Sequence[FileLayout]) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for file in files for tensor in file.tensors}


def _misfit(state: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor], resolution: Resolution) -> str | None:
    """Say why files of this layout would not load back as the model; None if every element of both has a counterpart."""
    missing = sorted(state.keys() - resolution.source_maps.keys())
    if missing or resolution.unexpected or resolution.mismatched:
        names = first_of([*missing, *sorted(resolution.unexpected)]) or resolution.mismatched[0].name
        return f"{names} would not load back"
    written = Counter()
    for source_map in resolution.source_maps.values():
        for region in source_map.regions:
            written[region.source] += math.prod(region.sizes)
    partial = [name for name, tensor in stored.items() if written[name] != tensor.numel]
    return f"{partial[0]} would not be written wholly" if partial else None


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
        if world.is_main:
            logger.warning("%s\nwriting the model to %s instead", error, rescue)
        try:
            export(rescue)
        except ZeroSftError as rescue_error:
            if world.is_main:
                logger.warning("%s", rescue_error)
            raise error from None
        raise ExportError(f"{error}\nThe trained model is complete in {rescue}.", code=error.code) from error
