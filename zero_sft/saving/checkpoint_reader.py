"""Give an engine the state of a checkpoint that `checkpoint_writer.py` has written, on any number of ranks.

Each rank reads its own flat ranges out of the files that hold them. A resumed run reads the weights here only if they are in
the ranks' files (`--save_on_each_node`), before the engine is made. Else the checkpoint is a model folder, from which the model
was loaded.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.file_identity import stat_identity
from zero_sft.checkpoint.manifest import Manifest
from zero_sft.cluster.control_group import all_gather_tensors
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import plan_reads
from zero_sft.printable import first_of
from zero_sft.saving.export_layout import ExportLayout
from zero_sft.saving.optimizer_files import SavedOptimizer, require_same_parameters
from zero_sft.saving.weight_files import part_nbytes
from zero_sft.storage import reader
from zero_sft.zero import optimizer_state, shards
from zero_sft.zero.optimizer_state import ParameterState


def restore_optimizer(engine: Any, folder: Path, manifest: Manifest, world: World, threads: int = 1) -> int:
    """Give the engine's optimizer the state in a checkpoint. Return the bytes that this rank has read.

    Every rank; communicates.

    Raises:
        CheckpointError: a file is damaged, or the optimizer has trained other parameters.
    """
    saved = SavedOptimizer.for_rank(folder, manifest.world_size, world)
    with collective_stage(world, "reading the optimizer's state", timeout_for_bytes(manifest.nbytes)):
        parameters = optimizer_state.trained_parameters(engine)
        formats = saved.formats()
        require_same_parameters(formats, parameters, folder)
        nbytes = sum(
            shards.local_range(param).numel * sum(dtype.itemsize for dtype in formats[name].dtypes.values())
            for name, param in parameters.items()
        )
        bytes_read = 0

        def fill(state: ParameterState) -> None:
            nonlocal bytes_read
            bytes_read += saved.fill(state, shards.full_numel(parameters[state.name]), threads, task.advance)

        with progress.task("reading the optimizer's state", nbytes, progress.BYTES) as task:
            optimizer_state.restore(engine, formats, fill)
    return bytes_read


def read_random_states(folder: Path, manifest: Manifest, world: World) -> dict[str, torch.Tensor] | None:
    """Return the random generators' states of this rank; None if another number of ranks wrote the checkpoint."""
    if manifest.world_size != world.world_size:
        return None
    return SavedOptimizer(folder, manifest.world_size).random_states(world.rank)


def restore_weights(tensors: Mapping[str, Any], layout: ExportLayout, folder: Path, world: World, threads: int = 1) -> None:
    """Give the model the weights in a checkpoint of this run, one tensor after the other. Every rank; communicates.

    The optimizer keeps its own copy of the weights, so no step may follow.

    Args:
        tensors: the tensors of the model, by name.
        layout: their layout in the files of the run's checkpoints.

    Raises:
        CheckpointError: a file can't be read, or has another layout.
    """
    with collective_stage(world, f"reading the weights of {folder.name}", timeout_for_bytes(layout.nbytes)):
        paths = {file.name: folder / file.name for file in layout.files}
        identities = {str(path): stat_identity(path) for path in paths.values()}
        for file in layout.files:
            with paths[file.name].open("rb") as stored:
                if stored.read(len(file.header)) != file.header:
                    raise CheckpointError(
                        f"{paths[file.name]} has another layout than this run writes: it is of another release or another run.",
                        code="resume.other_layout",
                    )
        stored = {
            tensor.name: dataclasses.replace(tensor, file=str(paths[tensor.file]))
            for file in layout.files
            for tensor in file.tensors
        }
        nbytes = part_nbytes(tensors, is_main=world.is_main)
        with progress.task("reading the weights", nbytes, progress.BYTES) as task:
            for name, tensor in tensors.items():
                with shards.new_part(tensor) as (flat_range, values):
                    reads = plan_reads([(layout.source_maps[name], flat_range)], stored)
                    reader.fill(reads, {name: values}, threads, identities, advance=task.advance)


def restore_own_weights(tensors: Mapping[str, Any], folder: Path, manifest: Manifest, world: World, threads: int = 1) -> None:
    """Give the model the weights in the ranks' files of a checkpoint. Every rank; communicates.

    Parameters may be gathered, as small ones are by an engine: then no step may follow.

    Args:
        tensors: the tensors of the model, by name.

    Raises:
        CheckpointError: a file can't be read, or has other tensors than the model.
    """
    with collective_stage(world, f"reading the weights of {folder.name}", timeout_for_bytes(manifest.nbytes)):
        saved = SavedOptimizer.for_rank(folder, manifest.world_size, world)
        shapes, wanted = saved.weight_shapes(), {name: shards.current_shape(tensor) for name, tensor in tensors.items()}
        if shapes != wanted:
            names = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                f"{folder} has other tensors than this run's model: {first_of(names)}. Give the model with which the run was "
                "started.",
                code="resume.other_tensors",
            )
        with progress.task("reading the weights", part_nbytes(tensors, is_main=True), progress.BYTES) as task:
            for name, tensor in tensors.items():
                whole = (full_range(tensor.numel()), tensor.detach().view(-1))
                own = shards.new_shard(tensor) if shards.is_sharded(tensor) else contextlib.nullcontext(whole)
                with own as (flat_range, values):
                    saved.fill_weight(name, flat_range, values, shards.full_numel(tensor), threads, task.advance)
    for param in tensors.values():
        if shards.is_sharded(param) and shards.is_gathered(param):
            shards.set_gathered(param, all_gather_tensors(world, shards.padded_shard(param).cpu()))
