"""Verify a load: compare the shards that the ranks hold with the files, by code that is independent of the load's.

The load plans byte ranges by tracing and reads them itself. Here safetensors and `torch.load` read the stored tensors whole,
and transformers' operations convert the real data. The results are partitioned as in ZeRO-3 and hashed. Each rank hashes the
shards that it holds, and the hashes must be equal. Each rank checks a part of the model's tensors, so the cluster reads every
byte once more, and a rank holds the sources of one tensor at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.file_identity import require_unchanged
from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.conversion.convert import FullShapeModel, convert_group
from zero_sft.conversion.keys import TensorGroup
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import shard_range


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """This rank's shard of a tensor: the digest of its elements without padding, their dtype, and the number of partitions."""

    digest: str
    dtype: torch.dtype
    parts: int


def digest(tensor: torch.Tensor) -> str:
    """Hash a tensor's elements in row-major order."""
    data: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def verify(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    groups: Sequence[TensorGroup],
    index: CheckpointIndex,
    held: Mapping[str, ShardDigest],
    world: World,
) -> int:
    """Compare every loaded tensor with the files. Every rank; communicates hashes.

    Args:
        state: the tensors of `model` in full shapes, on the meta device.
        groups: the groups of stored tensors from which the model's tensors are made.
        held: the digest of this rank's shard, for each tensor to check.

    Returns:
        The number of tensors checked.

    Raises:
        CheckpointError: on every rank, naming the tensors and ranks that differ.
    """
    local_digests: dict[str, list[str]] = {}
    with collective_stage(world, "reading the checkpoint back"):
        files = _Files(index)
        for group in groups[world.rank :: world.world_size]:
            for name, tensor in _convert(group, FullShapeModel(model, state), files):
                if name in held:
                    flat, parts = tensor.to(held[name].dtype).reshape(-1), held[name].parts
                    ranges = [shard_range(flat.numel(), rank, parts) for rank in range(parts)]
                    local_digests[name] = [digest(flat[part.start : part.stop]) for part in ranges]
    expected: dict[str, list[str]] = {}
    for rank_digests in all_gather_json(world, local_digests):
        expected |= rank_digests
    different = [
        name for name, shard in held.items() if name in expected and expected[name][world.rank % shard.parts] != shard.digest
    ]
    different_by_rank = all_gather_json(world, different)
    if any(different_by_rank):
        rank = next(rank for rank, names in enumerate(different_by_rank) if names)
        names = sorted(set().union(*different_by_rank))
        raise CheckpointError(
            f"the loaded weights differ from the files: {', '.join(names[:5])} ({len(names)} in all, first on rank {rank}). "
            "The files changed while they were read, or storage or memory is faulty. Load again, and compare file checksums.",
            code="checkpoint.verification_failed",
        )
    unread = sorted(held.keys() - expected.keys())
    if unread:
        raise CheckpointError(
            f"the files could not be compared with {', '.join(unread[:5])}. Load with --loader stock.",
            code="checkpoint.not_verified",
        )
    return len(held)


def _convert(group: TensorGroup, model: FullShapeModel, files: "_Files") -> Iterator[tuple[str, torch.Tensor]]:
    """Convert a group's stored tensors, with their real data, to the model's tensors."""
    if group.converter is None:
        yield group.name, files.tensor(next(iter(group.members)))
        return
    yield from convert_group(group, model, files.tensor).items()


class _Files:
    """The checkpoint's files, each opened once by its library."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._mapped: dict[str, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return one stored tensor, whole."""
        path = self._index.tensors[name].file
        is_safetensors = path.endswith(".safetensors")
        if path not in self._mapped:
            require_unchanged(path, path, self._index.identities.get(path))
            self._mapped[path] = self._open(path, is_safetensors)
        file = self._mapped[path]
        return file.get_tensor(name) if is_safetensors else file[name].detach()

    @staticmethod
    def _open(path: str, is_safetensors: bool) -> Any:
        if is_safetensors:
            from safetensors import safe_open

            return safe_open(path, framework="pt")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
