"""Lay out a model's tensors in files: which tensors are saved, under which names and shapes, in which file.

Every rank computes the same layout. The published format has the names and shapes of plain `save_pretrained`; it is used if it
loads back as the model, element for element. Else the files have the model's own names.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES, FileLayout, TensorRow, lay_out, lay_out_file
from zero_sft.checkpoint.folder_kind import ADAPTER_FILE
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.conversion.convert import Resolution, published_format, resolve
from zero_sft.errors import ExportError
from zero_sft.plan.plan import SourceMap
from zero_sft.plan.regions import identity_regions
from zero_sft.printable import first_of
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.transformers_internals import names_not_saved, tied_names
from zero_sft.zero import shards

logger = logging.getLogger(__name__)


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


def weights_to_save(model: nn.Module, named: Iterable[tuple[str, Any]] | None = None) -> dict[str, Any]:
    """Return the parameters and persistent buffers, without names that a reader ties to a written one.

    Args:
        named: the tensors by name; by default those of the model's state dict.

    Raises:
        ExportError: weights are in 4 bits.
    """
    tied = set(tied_names(model))
    ignored = names_not_saved(model)
    written: set[int] = set()
    tensors: dict[str, Any] = {}
    everything = list(model.state_dict(keep_vars=True).items() if named is None else named)
    for name, tensor in sorted(everything, key=lambda item: item[0] in tied):
        if torch.is_tensor(tensor) and name not in ignored and not (name in tied and id(tensor) in written):
            written.add(id(tensor))
            tensors[name] = tensor
    if in_codes := [name for name, tensor in tensors.items() if shards.holds_codes(tensor)]:
        raise ExportError(
            f"the model is in 4 bits ({first_of(in_codes, 1)}), so it can't be saved as a model. Save its adapter; to merge it "
            "into the unquantised weights: python -m zero_sft.export --adapter",
            code="export.in_4_bits",
        )
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
    return ExportLayout(files=_lay_out_files(state, max_file_bytes), source_maps=_identity_maps(state))


def adapter_layout(state: Mapping[str, torch.Tensor]) -> ExportLayout:
    """Lay out an adapter's tensors in PEFT's one file. Any rank; does not communicate."""
    return ExportLayout(files=(lay_out_file(ADAPTER_FILE, _rows(state)),), source_maps=_identity_maps(state))


def _identity_maps(state: Mapping[str, torch.Tensor]) -> dict[str, SourceMap]:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {name: SourceMap.of(name, shape, identity_regions(name, shape)) for name, shape in shapes.items()}


def _lay_out_files(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> tuple[FileLayout, ...]:
    return lay_out(_rows(tensors), max_file_bytes)


def _rows(tensors: Mapping[str, torch.Tensor]) -> list[TensorRow]:
    return [(name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


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
