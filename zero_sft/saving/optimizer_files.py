"""Write the optimizer's state to one safetensors file per rank, and read it back on any number of ranks.

`optimizer-00002-of-00004.safetensors` is the file of rank 1 of 4. It holds the flat range of this rank of every trained
parameter, for each state of the optimizer, under `KEY/PARAMETER`: `exp_avg/model.norm.weight`, and so on. The key `master` is
the weight in fp32, if the model has another dtype. `random/NAME` is the state of a random generator of this rank. Where the
nodes share no folder, `weight/NAME` is this rank's part of a weight in the model's dtype; else the weights have separate
files.

The header's metadata says which ranges these are, and has the optimizer's numbers (`step`):

| key of `__metadata__` | value (JSON) |
| --- | --- |
| `world_size`, `rank` | which ranks wrote the checkpoint |
| `ranges` | parameter → [start, stop, shape]: the elements in this file, and the full shape |
| `numbers` | parameter → number's name → [value, dtype]; dtype null is a Python number |
| `weights` | with `weight/NAME`: tensor → full shape; `unsharded` lists those that every file has in full |

To read it, each element's place is described as in a load (`SourceMap`): a rank reads its own range out of the files that
have it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.checksum import PartialChecksum
from zero_sft.checkpoint.file_identity import FileIdentity, stat_identity
from zero_sft.checkpoint.file_layout import FileLayout, lay_out_file
from zero_sft.checkpoint.header import StoredTensor, read_header, read_metadata
from zero_sft.checkpoint.manifest import optimizer_file
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import FlatRange, full_range, shard_range
from zero_sft.plan.plan import SourceMap, plan_reads
from zero_sft.plan.regions import Region, identity_regions
from zero_sft.plan.reshard import saved_spans
from zero_sft.printable import excerpt, first_of
from zero_sft.saving.weight_files import WeightPart
from zero_sft.storage import reader
from zero_sft.storage.dtypes import STORED_DTYPES, TORCH_DTYPES
from zero_sft.storage.writer import write_at
from zero_sft.zero.optimizer_state import Number, ParameterState, StateFormat

RANDOM = "random"
"""The key of the states of a rank's random generators, in place of a parameter's."""

WEIGHT = "weight"
"""The key of the model's tensors, next to those of the optimizer's states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedParameter:
    """A trained parameter: its full shape, and the elements of this rank."""

    shape: tuple[int, ...]
    flat_range: FlatRange


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor of the model: its full shape, and the number of elements that this rank saves, which is all if unsharded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    is_sharded: bool


def lay_out(
    parameters: Mapping[str, SavedParameter],
    formats: Mapping[str, StateFormat],
    random_states: Mapping[str, torch.Tensor],
    weights: Mapping[str, SavedTensor],
    rank: int,
    world_size: int,
) -> FileLayout:
    """Lay out the file of a rank. Any rank; does not communicate.

    Args:
        weights: the tensors of the model that the file holds as well; empty if they have separate files.
    """
    rows = (
        [
            (stored_name(RANDOM, name), STORED_DTYPES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in random_states.items()
        ]
        + [
            (stored_name(key, name), STORED_DTYPES[dtype], (parameter.flat_range.numel,))
            for name, parameter in parameters.items()
            for key, dtype in formats[name].dtypes.items()
        ]
        + [(stored_name(WEIGHT, name), STORED_DTYPES[each.dtype], (each.numel,)) for name, each in weights.items()]
    )
    ranges = {name: [each.flat_range.start, each.flat_range.stop, each.shape] for name, each in parameters.items()}
    numbers = {name: _numbers_to_json(formats[name].numbers) for name in parameters}
    metadata: dict[str, Any] = {"world_size": world_size, "rank": rank, "ranges": ranges, "numbers": numbers}
    if weights:
        metadata["weights"] = {name: each.shape for name, each in weights.items()}
        metadata["unsharded"] = [name for name, each in weights.items() if not each.is_sharded]
    return lay_out_file(
        optimizer_file(rank, world_size),
        rows,
        {key: json.dumps(value, separators=(",", ":")) for key, value in metadata.items()},
    )


def stored_name(key: str, name: str) -> str:
    """Return the name in the file of a parameter's state."""
    return f"{key}/{name}"


def state_sizes(layout: FileLayout) -> dict[str, tuple[int, torch.dtype]]:
    """Return the number of elements and the dtype of each state in a rank's file, by the name there."""
    return {
        stored.name: (stored.numel, TORCH_DTYPES[stored.dtype])
        for stored in layout.tensors
        if not stored.name.startswith(stored_name(RANDOM, ""))
    }


def write(
    path: Path,
    layout: FileLayout,
    states: Iterable[ParameterState],
    random_states: Mapping[str, torch.Tensor],
    weights: Iterable[WeightPart] = (),
) -> PartialChecksum:
    """Write a rank's file and sync it. Return its checksum.

    Raises:
        OSError: it can't be written; the error names it.
    """
    checksum, offsets = PartialChecksum(), {tensor.name: tensor.offset_bytes for tensor in layout.tensors}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.write(handle, layout.header)
        checksum.add(0, layout.header)
        for name, tensor in random_states.items():
            write_at(handle, path, tensor.reshape(-1), offsets[stored_name(RANDOM, name)], checksum)
        for state in states:
            for key, tensor in state.tensors.items():
                write_at(handle, path, tensor, offsets[stored_name(key, state.name)], checksum)
        for part in weights:
            write_at(handle, path, part.values, offsets[stored_name(WEIGHT, part.name)], checksum)
        os.fsync(handle)
    finally:
        os.close(handle)
    return checksum


class SavedOptimizer:
    """The ranks' files in a checkpoint's folder, for a rank of any world.

    Args:
        world_size: the number of ranks that wrote them.
        described_by: the rank whose file is read for what all of them say alike.
    """

    def __init__(self, folder: Path, world_size: int, described_by: int = 0) -> None:
        self._folder, self._world_size, self._described_by = folder, world_size, described_by
        self._headers: dict[int, Mapping[str, StoredTensor]] = {}
        self._identities: dict[str, FileIdentity] = {}
        self._metadata: Mapping[str, str] | None = None

    @classmethod
    def for_rank(cls, folder: Path, world_size: int, world: World) -> "SavedOptimizer":
        """Open the files for this rank, which needs no file but its own if as many ranks wrote them."""
        return cls(folder, world_size, world.rank if world.world_size == world_size else 0)

    def formats(self) -> dict[str, StateFormat]:
        """Return the format of the optimizer's state of each trained parameter.

        Raises:
            CheckpointError: a file can't be read, or is not one of an optimizer.
        """
        with self._parsing() as metadata:
            numbers: Mapping[str, Any] = json.loads(metadata["numbers"])
            result = {name: StateFormat(dtypes={}, numbers=_numbers_from_json(row)) for name, row in numbers.items()}
            dtypes: dict[str, dict[str, torch.dtype]] = {name: {} for name in result}
            for stored in self._header(self._described_by).values():
                key, name = stored.name.split("/", 1)
                if key not in (RANDOM, WEIGHT):
                    dtypes[name][key] = TORCH_DTYPES[stored.dtype]
        return {name: StateFormat(dtypes=dtypes[name], numbers=each.numbers) for name, each in result.items()}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shapes of the model's tensors in these files; empty if they have separate files.

        Raises:
            CheckpointError: a file can't be read, or is not one of an optimizer.
        """
        with self._parsing() as metadata:
            return {str(name): tuple(shape) for name, shape in json.loads(metadata.get("weights", "{}")).items()}

    def weight_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one of the model's tensors in these files."""
        return TORCH_DTYPES[self._header(self._described_by)[stored_name(WEIGHT, name)].dtype]

    def fill(self, state: ParameterState, numel: int, threads: int = 1, advance: Callable[[int], None] | None = None) -> int:
        """Read a parameter's state into its tensors. Return the bytes read.

        Args:
            numel: the number of elements of the full parameter.
            advance: called with the number of bytes after each read.

        Raises:
            CheckpointError: a file can't be read, or has fewer elements.
        """
        ranks = {span.rank for span in saved_spans(state.flat_range, numel, self._world_size)}
        held = {rank: shard_range(numel, rank, self._world_size) for rank in ranks}
        return self._fill(state, numel, held, threads, advance)

    def fill_weight(
        self,
        name: str,
        flat_range: FlatRange,
        values: torch.Tensor,
        numel: int,
        threads: int = 1,
        advance: Callable[[int], None] | None = None,
    ) -> int:
        """Read the elements `flat_range` of a tensor of the model, of `numel` elements, into `values`. Return the bytes read.

        Raises:
            CheckpointError: as in `fill`.
        """
        part = ParameterState(name=name, flat_range=flat_range, tensors={WEIGHT: values})
        with self._parsing() as metadata:
            is_sharded = name not in json.loads(metadata["unsharded"])
        if is_sharded:
            return self.fill(part, numel, threads, advance)
        return self._fill(part, numel, {self._described_by: full_range(numel)}, threads, advance)

    def _fill(
        self,
        state: ParameterState,
        numel: int,
        held: Mapping[int, FlatRange],
        threads: int,
        advance: Callable[[int], None] | None,
    ) -> int:
        """Read from the files of the ranks that hold these ranges."""
        targets, stored = [], {}
        for key in state.tensors:
            regions = []
            for rank, flat_range in held.items():
                stored[f"{rank}:{key}"] = self._tensor(rank, stored_name(key, state.name), flat_range.numel)
                regions.append(
                    Region(start=(flat_range.start,), sizes=(flat_range.numel,), source=f"{rank}:{key}", offset=0, strides=(1,))
                )
            targets.append((SourceMap.of(key, (numel,), tuple(regions)), state.flat_range))
        reads = plan_reads(targets, stored)
        return reader.fill(reads, state.tensors, threads, self._identities, advance=advance)

    def random_states(self, rank: int) -> dict[str, torch.Tensor]:
        """Return the states of the random generators of one of the ranks that wrote the checkpoint."""
        prefix = stored_name(RANDOM, "")
        stored = {tensor.name: tensor for tensor in self._header(rank).values() if tensor.name.startswith(prefix)}
        result = {name: torch.zeros(tensor.numel, dtype=TORCH_DTYPES[tensor.dtype]) for name, tensor in stored.items()}
        targets = [
            (SourceMap.of(name, tensor.shape, identity_regions(name, tensor.shape)), full_range(tensor.numel))
            for name, tensor in stored.items()
        ]
        reader.fill(plan_reads(targets, stored), result, identities=self._identities)
        return {name.removeprefix(prefix): tensor.view(stored[name].shape) for name, tensor in result.items()}

    @contextlib.contextmanager
    def _parsing(self) -> Iterator[Mapping[str, str]]:
        """Provide what a header says of all files; an error while it is parsed names the file."""
        path = self._folder / optimizer_file(self._described_by, self._world_size)
        if self._metadata is None:
            self._metadata = read_metadata(path)
        try:
            yield self._metadata
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} has no description of an optimizer's state in its header ({error!r:.80}). Take another checkpoint.",
                code="resume.bad_optimizer_file",
            ) from error

    def _header(self, rank: int) -> Mapping[str, StoredTensor]:
        if rank not in self._headers:
            path = self._folder / optimizer_file(rank, self._world_size)
            self._identities[str(path)] = stat_identity(path)
            metadata = read_metadata(path)
            if [metadata.get("rank"), metadata.get("world_size")] != [str(rank), str(self._world_size)]:
                raise CheckpointError(
                    f"{path} is not the file of rank {rank} of {self._world_size}: its header has rank "
                    f"{excerpt(metadata.get('rank'))} of {excerpt(metadata.get('world_size'))}. Take another checkpoint.",
                    code="resume.bad_optimizer_file",
                )
            self._headers[rank] = read_header(path)
        return self._headers[rank]

    def _tensor(self, rank: int, name: str, numel: int) -> StoredTensor:
        tensor, described = self._header(rank).get(name), self._header(self._described_by).get(name)
        if tensor is None or described is None or (tensor.numel, tensor.dtype) != (numel, described.dtype):
            held = "it is not there" if tensor is None else f"it has {tensor.numel} of {tensor.dtype} there"
            expected = f"{numel} elements of {described.dtype}" if described else f"{numel} elements"
            raise CheckpointError(
                f"{self._folder / optimizer_file(rank, self._world_size)} should have {expected} as {excerpt(name)}, "
                f"and {held}. Take another checkpoint.",
                code="resume.optimizer_state_missing",
            )
        return tensor


def require_same_parameters(saved: Iterable[str], trained: Iterable[str], folder: Path) -> None:
    """Check that a checkpoint's optimizer has trained the parameters that this run trains.

    Raises:
        CheckpointError: with the names that only one of them has.
    """
    saved_names, trained_names = set(saved), set(trained)
    if saved_names != trained_names:
        parts = (("the checkpoint alone", saved_names - trained_names), ("this run alone", trained_names - saved_names))
        raise CheckpointError(
            f"{folder} is of a run that trained other parameters: "
            + "; ".join(f"{first_of(sorted(names))} in {where}" for where, names in parts if names)
            + ". Give the model with which the run was started.",
            code="resume.other_parameters",
        )


def _numbers_to_json(numbers: Mapping[str, Number]) -> dict[str, list[Any]]:
    return {
        key: [value.item(), STORED_DTYPES[value.dtype]] if isinstance(value, torch.Tensor) else [value, None]
        for key, value in numbers.items()
    }


def _numbers_from_json(row: Mapping[str, Sequence[Any]]) -> dict[str, Number]:
    if any(not isinstance(value, (int, float)) for value, _ in row.values()):
        raise ValueError("not a number")
    return {
        key: value if dtype is None else torch.tensor(value, dtype=TORCH_DTYPES[dtype]) for key, (value, dtype) in row.items()
    }
