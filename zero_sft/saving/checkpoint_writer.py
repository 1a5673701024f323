"""Write a run's checkpoint: the weights as a Hugging Face folder, the optimizer's state, what else the run needs to go on.

| file | written by | content |
| --- | --- | --- |
| `model*.safetensors`, config, tokenizer | the weights by all ranks, the rest by rank 0 | a model folder, as an export is |
| `optimizer-R-of-N.safetensors` | every rank its own | `optimizer_files.py`; and the states of its random generators |
| `trainer_state.json` | rank 0 | the Trainer's state: step, log |
| `training_state.json` | rank 0 | the schedule, and the engine's counters |
| `manifest.json` | rank 0, last | every file's size and CRC-32 |

No rank gathers anything: each writes what it holds. Where the nodes share no folder (`on_each_node`), each node has its own,
with the files of its ranks. These hold the weights as well, in place of `model*.safetensors`, and the first rank of each node
writes what is rank 0's in the table. All nodes' folders copied into one make a complete checkpoint.

`describe_checkpoint` collects what is not a tensor. Then a checkpoint is
made in steps: `begin_checkpoint`, `write_parts`, `agree_on_manifest`, `put_in_place`, `finish_checkpoint`. The second and the
fourth do not communicate, so a thread may run them while training goes on. All files are in a hidden folder until it is
renamed. `checkpoint_saver.py` takes these steps.
"""

import contextlib
import itertools
import logging
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.checksum import PartialChecksum, combine
from zero_sft.checkpoint.file_layout import FileLayout
from zero_sft.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, optimizer_file
from zero_sft.cluster.control_group import all_gather_json, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError, ZeroSftError
from zero_sft.saving import optimizer_files, weight_files
from zero_sft.saving.checkpoint_folders import FORMER_SUFFIX, PARTIAL_SUFFIX, next_date, remove
from zero_sft.saving.export_layout import ExportLayout
from zero_sft.saving.folder import explain_write_errors, sync
from zero_sft.saving.optimizer_files import SavedParameter, SavedTensor
from zero_sft.saving.random_states import random_states
from zero_sft.saving.weight_files import WeightPart
from zero_sft.zero import optimizer_state, shards
from zero_sft.zero.optimizer_state import ParameterState

logger = logging.getLogger("zero_sft.train")

NO_ROOM = "save.no_room"
"""Error code of a checkpoint for which the disk has no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of a run, for the manifest, which describes the fields."""

    step: int
    samples: int
    loss: float | None
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContent:
    """All that a checkpoint consists of, except the weights and the optimizer's state themselves.

    Attributes:
        target: the checkpoint's folder, on a file system that all ranks share, or `on_each_node`.
        weights: the layout of the weights' files, the same on every rank; None with `on_each_node`.
        optimizer: the layout of this rank's file with the optimizer's state.
        random_states: this rank's random generators, as host tensors by name.
        small_files: config, tokenizer and the run's state, as contents by path in the folder; empty except on rank 0 or, with
            `on_each_node`, on each node's first rank.
    """

    target: Path
    weights: ExportLayout | None
    optimizer: FileLayout
    random_states: Mapping[str, torch.Tensor]
    small_files: Mapping[str, bytes]
    progress: Progress

    @property
    def on_each_node(self) -> bool:
        """Whether each node has its own folder."""
        return self.weights is None

    @property
    def own_nbytes(self) -> int:
        """Bytes of the files that this rank alone writes."""
        return self.optimizer.nbytes + sum(map(len, self.small_files.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFolder:
    """The hidden folder of a checkpoint that is being written; `is_owned`: this rank writes what is needed once in it."""

    path: Path
    is_owned: bool


def describe_checkpoint(
    engine: Any,
    tensors: Mapping[str, Any],
    target: Path,
    weights: ExportLayout | None,
    small_files: Callable[[], Mapping[str, bytes]],
    progress: Progress,
    world: World,
) -> CheckpointContent:
    """Collect what a checkpoint of the engine's present state consists of. Every rank; communicates.

    `CheckpointContent` describes the arguments.

    Args:
        tensors: the tensors of the model, by name.
        small_files: returns the contents by path; called on rank 0.

    Raises:
        ExportError: the optimizer's state has no such format.
        DistributedError: the ranks' optimizers keep different states.
    """
    with collective_stage(world, f"describing {target.name}") as exchange, explain_write_errors(target):
        parameters = {
            name: SavedParameter(shape=shards.full_shape(param), flat_range=shards.local_range(param))
            for name, param in optimizer_state.trained_parameters(engine).items()
        }
        formats, generators = optimizer_state.state_format(engine), random_states()
        exchange.must_match = ("state of the optimizer", {name: sorted(each.dtypes) for name, each in formats.items()})
        files = dict(small_files()) if world.is_main else {}
        if weights is not None and world.is_main:
            files |= weight_files.index_file(weights.files)
        own_weights = _saved_tensors(tensors) if weights is None else {}
        optimizer = optimizer_files.lay_out(parameters, formats, generators, own_weights, world.rank, world.world_size)
    if weights is None:
        files = _from_rank_0(files, world)
    return CheckpointContent(
        target=target,
        weights=weights,
        optimizer=optimizer,
        random_states=generators,
        small_files=files if world.leads_folder(on_each_node=weights is None) else {},
        progress=progress,
    )


def _saved_tensors(tensors: Mapping[str, Any]) -> dict[str, SavedTensor]:
    sizes = {name: numel for name, numel, _ in weight_files.part_sizes(tensors, is_main=True)}
    return {
        name: SavedTensor(
            shape=shards.current_shape(tensor),
            dtype=tensor.dtype,
            numel=sizes[name],
            is_sharded=shards.is_sharded(tensor),
        )
        for name, tensor in tensors.items()
    }


def _from_rank_0(files: Mapping[str, bytes], world: World) -> dict[str, bytes]:
    """Return the files that rank 0 has, on every rank. Every rank; communicates."""
    sizes: dict[str, int] = all_gather_json(world, {name: len(content) for name, content in files.items()})[0]
    everything = broadcast_bytes(world, b"".join(files.values()) if world.is_main else None)
    starts = itertools.accumulate(sizes.values(), initial=0)
    return {name: everything[start : start + size] for (name, size), start in zip(sizes.items(), starts, strict=False)}


def begin_checkpoint(content: CheckpointContent, world: World) -> CheckpointFolder:
    """Make the hidden folder, with files of full size for the weights, and return it. Every rank; communicates.

    Raises:
        ExportError: the folder can't be written, or does not have room. Nothing is left of it.
    """
    target = content.target
    with collective_stage(world, f"starting {target.name}") as exchange:
        exchange.local = [content.own_nbytes, world.node_leader, f".{target.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"]
    path = target.with_name(exchange.gathered[0][2])
    is_owned = world.is_main
    stage = collective_stage(world, f"preparing {target.name}")
    with removed_on_error(path, content, world), stage, explain_write_errors(target):
        if world.is_main:
            nbytes = _own_bytes(exchange.gathered, 0 if content.on_each_node else None)
            _make_folder(path, target, nbytes + (content.weights.nbytes if content.weights else 0))
            if content.weights is not None:
                weight_files.write_headers(path, content.weights.files)
    if content.on_each_node:
        stage = collective_stage(world, f"preparing {target.name} on each node")
        with removed_on_error(path, content, world), stage, explain_write_errors(target):
            if world.leads_node and not path.is_dir():  # nodes may share a folder after all
                with contextlib.suppress(FileExistsError):
                    _make_folder(path, target, _own_bytes(exchange.gathered, world.node_leader))
                    is_owned = True
    return CheckpointFolder(path=path, is_owned=is_owned)


def _own_bytes(gathered: Sequence[Sequence[Any]], leader: int | None) -> int:
    """Return the bytes of the files that the ranks write, each its own: those of one node, or of all."""
    return sum(nbytes for nbytes, own_leader, _ in gathered if leader in (None, own_leader))


def _make_folder(path: Path, target: Path, nbytes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_room(target, nbytes)
    path.mkdir()


def write_parts(
    folder: CheckpointFolder,
    content: CheckpointContent,
    parts: Iterable[WeightPart],
    states: Iterable[ParameterState],
    *,
    is_main: bool,
) -> dict[str, tuple[int, int]]:
    """Write and sync what this rank holds. Any rank; does not communicate.

    Returns:
        For each file that this rank has written to, its bytes and this rank's term of its CRC-32.

    Raises:
        OSError: a write failed; the error names the file.
    """
    terms: dict[str, tuple[int, int]] = {}
    own = content.optimizer
    if content.weights is not None:
        files = content.weights.files
        checksums = {file.name: PartialChecksum() for file in files}
        weight_files.write_parts(folder.path, files, content.weights.source_maps, parts, checksums=checksums)
        if is_main:
            for file in files:
                checksums[file.name].add(0, file.header)
        terms |= {file.name: (file.nbytes, checksums[file.name].of_file_with(file.nbytes)) for file in files}
        parts = ()
    written = optimizer_files.write(folder.path / own.name, own, states, content.random_states, parts)
    terms[own.name] = (own.nbytes, written.of_file_with(own.nbytes))
    if folder.is_owned:
        for name, text in content.small_files.items():
            (folder.path / name).parent.mkdir(exist_ok=True)
            (folder.path / name).write_bytes(text)
            sync(folder.path / name)
    if is_main:
        terms |= {name: (len(text), zlib.crc32(text)) for name, text in content.small_files.items()}
    return terms


def agree_on_manifest(
    folder: CheckpointFolder, content: CheckpointContent, terms: Callable[[], Mapping[str, tuple[int, int]]], world: World
) -> Manifest:
    """Return the manifest of what all ranks have written. Every rank; communicates.

    Args:
        terms: returns what `write_parts` does, when this rank's part is written; called once.

    Raises:
        ExportError: a rank could not write its part. The hidden folder is removed.
    """
    target = content.target
    nbytes = world.world_size * content.own_nbytes + (content.weights.nbytes if content.weights else 0)
    stage = collective_stage(world, f"writing {target.name}", timeout_for_bytes(nbytes))
    with removed_on_error(folder.path, content, world), stage as exchange, explain_write_errors(target):
        exchange.local = [dict(terms()), socket.gethostname(), next_date(target.parent) if world.is_main else ""]
    hosts = [host for _, host, _ in exchange.gathered]
    own_names = [optimizer_file(rank, world.world_size) for rank in range(world.world_size)]
    progress = content.progress
    return Manifest(
        step=progress.step,
        world_size=world.world_size,
        samples=progress.samples,
        loss=progress.loss,
        dtype=progress.dtype,
        written=exchange.gathered[0][2],
        files=_file_records([terms for terms, _, _ in exchange.gathered]),
        hosts=dict(zip(own_names, hosts, strict=True)) if content.on_each_node else {},
    )


def _file_records(gathered: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, FileRecord]:
    """Put together what all ranks have written. Pure."""
    sizes = {name: nbytes for terms in gathered for name, (nbytes, _) in terms.items()}
    crcs = {name: combine(terms[name][1] for terms in gathered if name in terms) for name in sizes}
    return {name: FileRecord(nbytes=nbytes, crc32=f"{crcs[name]:08x}") for name, nbytes in sorted(sizes.items())}


def put_in_place(folder: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest, and rename the folder. The rank that owns it; does not communicate.

    A checkpoint of this name, of an earlier attempt at the same step, is removed; another folder gets another name.

    Raises:
        OSError: it failed; the error names the file.
    """
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    sync(folder / MANIFEST_FILE)
    sync(folder)
    former = None
    if os.path.lexists(target):
        former = folder.with_name(f".{target.name}.{secrets.token_hex(4)}{FORMER_SUFFIX}")
        target.rename(former)
    try:
        folder.rename(target)
    except OSError:
        if former is not None:
            former.rename(target)
        raise
    if former is not None and _is_checkpoint(former):
        remove(former)
    elif former is not None:
        kept = target.with_name(f"{target.name}-kept-{secrets.token_hex(4)}")
        former.rename(kept)
        logger.warning("%s was no checkpoint: what it held is in %s now", target, kept)
    sync(target.parent)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, or a part of one that a killed run has left."""
    if folder.is_symlink():  # the link alone is removed
        return True
    if not folder.is_dir():
        return False
    if any((folder / name).exists() for name in (MANIFEST_FILE, "trainer_state.json", "latest")):
        return True
    return any(re.match(r"global_step|optimizer-|model", path.name) for path in folder.iterdir()) or not any(folder.iterdir())


def finish_checkpoint(folder: CheckpointFolder, content: CheckpointContent, placed: Callable[[], object], world: World) -> None:
    """Agree that the checkpoint has its name. Every rank; communicates.

    Args:
        placed: returns when the folder is in its place; called once, on the ranks that own a folder.

    Raises:
        ExportError: it could not. The hidden folder is removed.
    """
    target = content.target
    stage = collective_stage(world, f"finishing {target.name}")
    with removed_on_error(folder.path, content, world), stage, explain_write_errors(target):
        if folder.is_owned:
            placed()


@contextlib.contextmanager
def removed_on_error(folder: Path, content: CheckpointContent, world: World) -> Iterator[None]:
    """Remove the hidden folder, or that of each node, if a stage fails, which it does on every rank."""
    try:
        yield
    except ZeroSftError:
        if world.leads_folder(on_each_node=content.on_each_node):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_room(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise ExportError(
            f"{target} needs {nbytes:,} bytes, and {target.parent} on {socket.gethostname()} has {free:,} free. Remove earlier "
            "checkpoints, give --save_total_limit, or name another --output_dir.",
            code=NO_ROOM,
        )
