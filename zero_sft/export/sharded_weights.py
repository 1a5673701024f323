"""The weights in a checkpoint of this project: the master weights in the ranks' files, and all others in the model's.

Where the nodes shared no folder, all weights are in the ranks' files (`RankWeights`).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.index import read_index
from zero_sft.checkpoint.manifest import hosts_of_missing_files, read_manifest
from zero_sft.checkpoint.scaled import ScaledTensor
from zero_sft.conversion.convert import resolve
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import plan_reads
from zero_sft.printable import first_of
from zero_sft.saving.optimizer_files import SavedOptimizer
from zero_sft.storage import reader
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.storage.torch_zip import read_bin_header
from zero_sft.zero.optimizer_state import MASTER, ParameterState


class FolderWeights:
    """The weights in a model folder; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path, model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Read the headers.

        Args:
            dtype: that in which the run trained.

        Raises:
            CheckpointError: a file can't be read, or the weights are not those of the model.
        """
        index = read_index(folder, read_bin_header)
        self.dtype = dtype
        self._identities = index.identities
        resolution = resolve(model, state, index.tensors)
        self.rules = resolution.rules_used
        self._source_maps, self._stored = resolution.source_maps, resolution.stored_tensors
        scaled = [tensor.name for tensor in self._stored.values() if isinstance(tensor, ScaledTensor)]
        if names := sorted(resolution.untraceable) or sorted(scaled):
            raise CheckpointError(
                f"{folder}: {first_of(names)} can't be read tensor by tensor. Load the folder, which is a model, and save it.",
                code="export.computed_tensors",
            )
        self.shapes = {name: tuple(state[name].shape) for name in resolution.source_maps}

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        source_map = self._source_maps[name]
        numel = math.prod(source_map.shape)
        stored = self._stored[source_map.regions[0].source]
        values = torch.empty(numel, dtype=TORCH_DTYPES[stored.dtype])
        reader.fill(plan_reads([(source_map, full_range(numel))], self._stored), {name: values}, identities=self._identities)
        return values


class ShardedWeights(FolderWeights):
    """The weights in the folder of a checkpoint with a manifest; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path, model: PreTrainedModel, state: Mapping[str, torch.Tensor], *, use_masters: bool) -> None:
        """Read the headers.

        Args:
            use_masters: read the master weights where there are any.

        Raises:
            CheckpointError: a file can't be read, or the weights are not those of the model.
        """
        manifest = read_manifest(folder)
        super().__init__(folder, model, state, getattr(torch, manifest.dtype))
        self._optimizer = SavedOptimizer(folder, manifest.world_size)
        self._masters = masters(self._optimizer) if use_masters else set()

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        if name in self._masters:
            return read_master(self._optimizer, name, math.prod(self.shapes[name]))
        return super().read(name)


class RankWeights:
    """The weights in the ranks' files of all nodes, copied into one folder; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path, *, use_masters: bool) -> None:
        """Read the headers.

        Args:
            use_masters: read the master weights where there are any.

        Raises:
            CheckpointError: a file is missing, or can't be read.
        """
        manifest = read_manifest(folder)
        if missing := hosts_of_missing_files(folder, manifest):
            name, host = next(iter(missing.items()))
            raise CheckpointError(
                f"{folder} lacks {name}, which the host {host} wrote (--save_on_each_node): copy this folder of all hosts "
                "into one.",
                code="export.on_another_host",
            )
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self.rules = None
        self._optimizer = SavedOptimizer(folder, manifest.world_size)
        self.shapes = self._optimizer.weight_shapes()
        self._masters = masters(self._optimizer) if use_masters else set()

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        numel = math.prod(self.shapes[name])
        if name in self._masters:
            return read_master(self._optimizer, name, numel)
        values = torch.empty(numel, dtype=self._optimizer.weight_dtype(name))
        self._optimizer.fill_weight(name, full_range(numel), values, numel)
        return values


def masters(optimizer: SavedOptimizer) -> set[str]:
    """Return the names of the parameters of which the optimizer's files have master weights."""
    return {name for name, each in optimizer.formats().items() if MASTER in each.dtypes}


def read_master(optimizer: SavedOptimizer, name: str, numel: int) -> torch.Tensor:
    """Return a parameter's master weights, flat, in fp32."""
    values = torch.empty(numel, dtype=torch.float32)
    optimizer.fill(ParameterState(name=name, flat_range=full_range(numel), tensors={MASTER: values}), numel)
    return values
