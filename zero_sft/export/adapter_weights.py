"""The weights of adapters: those in a checkpoint or a folder of PEFT, and those of a base model with one merged into it.

The model with its adapter is on the meta device. It says how its tensors are called, and PEFT's own functions compute what an
adapter adds to a weight.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zero_sft.adapters import peft_internals
from zero_sft.adapters.files import adapter_file, read_adapter_header
from zero_sft.adapters.merge import merged_tensors, merged_values
from zero_sft.checkpoint.file_identity import stat_identity
from zero_sft.checkpoint.folder_kind import ADAPTER_FILE
from zero_sft.checkpoint.header import read_header
from zero_sft.checkpoint.manifest import has_manifest, read_manifest
from zero_sft.errors import CheckpointError
from zero_sft.export.saved_weights import SavedWeights
from zero_sft.export.sharded_weights import masters, read_master
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import SourceMap, plan_reads
from zero_sft.plan.regions import identity_regions
from zero_sft.saving.optimizer_files import SavedOptimizer
from zero_sft.storage import reader
from zero_sft.storage.dtypes import TORCH_DTYPES


class AdapterWeights:
    """The weights of an adapter, in a folder of PEFT or a checkpoint; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path, adapted: Any, *, use_masters: bool) -> None:
        """Read the headers.

        Args:
            adapted: the model with its adapter, on meta.
            use_masters: read the master weights where there are any.

        Raises:
            CheckpointError: a file can't be read, or has other tensors.
        """
        tensors = peft_internals.saved_tensors(adapted)
        self._stored = read_adapter_header(folder, tensors)
        self._identities = {str(folder / ADAPTER_FILE): stat_identity(folder / ADAPTER_FILE)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.rules: Sequence[Any] | None = None
        self.dtype = stored_dtype(folder)
        self._names = _parameter_names(adapted, tensors)
        self._optimizer = SavedOptimizer(folder, read_manifest(folder).world_size) if has_manifest(folder) else None
        self._masters = masters(self._optimizer) if use_masters and self._optimizer is not None else set()

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        shape = self.shapes[name]
        numel = math.prod(shape)
        if self._optimizer is not None and self._names[name] in self._masters:
            return read_master(self._optimizer, self._names[name], numel)
        source_map = SourceMap.of(name, shape, identity_regions(name, shape))
        values = torch.empty(numel, dtype=TORCH_DTYPES[self._stored[name].dtype])
        reader.fill(plan_reads([(source_map, full_range(numel))], self._stored), {name: values}, identities=self._identities)
        return values


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the weights in an adapter's file.

    Raises:
        CheckpointError: the file can't be read, or has no tensors.
    """
    tensors = read_header(adapter_file(folder)).values()
    if not tensors:
        raise CheckpointError(f"{folder / ADAPTER_FILE} has no tensors. Name another adapter.", code="adapter.no_weights")
    return TORCH_DTYPES[next(iter(tensors)).dtype]


def _parameter_names(adapted: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return for each saved name the name in the adapted model."""
    names = {id(tensor): name for name, tensor in adapted.state_dict(keep_vars=True).items()}
    return {name: names[id(tensor)] for name, tensor in tensors.items()}


class MergedWeights:
    """A base model's weights with an adapter merged; `SavedWeights` describes the methods."""

    def __init__(self, base: SavedWeights, adapted: Any, adapter: SavedWeights, dtype: torch.dtype) -> None:
        """Read the adapter, which is small, into the adapted model.

        Args:
            base: the base model's weights, under its names.
            adapted: the base model with the adapter, on meta.
            dtype: that in which the weights are merged.
        """
        self.dtype, self.rules, self.shapes, self._base = dtype, base.rules, base.shapes, base
        tensors = peft_internals.saved_tensors(adapted)
        values = {
            name: adapter.read(saved).view(adapter.shapes[saved]).to(dtype)
            for saved, name in _parameter_names(adapted, tensors).items()
        }
        names = {id(tensor): name for name, tensor in reversed(list(merged_tensors(adapted)))}  # of tied ones the first
        layers = {
            names[id(peft_internals.adapted_parameter(layer))]: layer for _, layer in peft_internals.adapted_layers(adapted)
        }
        placeholders = {  # of base weights that PEFT asks for device and dtype
            name: torch.empty(1, dtype=dtype).expand(tensor.shape)
            for name, tensor in adapted.state_dict(keep_vars=True).items()
            if names.get(id(tensor)) in layers
        }
        adapted.load_state_dict(placeholders | values, strict=False, assign=True)
        self._layers: Mapping[str, Any] = layers
        self._replaced = {
            base_name: values[name] for name in values if (base_name := peft_internals.base_name(name)) is not None
        }

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        if name in self._replaced:
            return self._replaced[name].reshape(-1)
        values = self._base.read(name)
        layer = self._layers.get(name)
        if layer is None:
            return values
        with torch.no_grad():
            return merged_values(layer, self.shapes[name], full_range(values.numel()), values.to(self.dtype), None)
