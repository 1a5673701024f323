"""Read back: is what the ranks hold what the files say? Along another path than the load's.

The load plans byte ranges by tracing and reads them itself. Here the stored tensors are read whole by the libraries
(safetensors, `torch.load`), converted by transformers' own operations on real data, cut as ZeRO-3 cuts and hashed; each rank
hashes the shards that it holds; the two must be equal. The model's tensors are shared out among the ranks, so every byte is
read once more in the whole cluster, and a rank holds one tensor's sources at a time.
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
from zero_sft.conversion.convert import FullShapeModel, run
from zero_sft.conversion.keys import TensorGroup
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import shard_range


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """What this rank has of a tensor: the digest of its real elements, their dtype, and into how many parts it is cut."""

    digest: str
    dtype: torch.dtype
    parts: int


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's elements in row-major order."""
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
        state: the whole tensors of `model`, on the meta device.
        groups: which stored tensors make which of the model's.
        held: what this rank has of each tensor to be checked.

    Returns:
        The number of tensors checked.

    Raises:
        CheckpointError: on every rank, naming the tensors and ranks that differ.
    """
    expected: dict[str, list[str]] = {}
    with collective_stage(world, "reading the checkpoint back"):
        files = _Files(index)
        for group in groups[world.rank :: world.world_size]:
            for name, tensor in _converted(group, FullShapeModel(model, state), files):
                if name in held:
                    flat, parts = tensor.to(held[name].dtype).reshape(-1), held[name].parts
                    spans = [shard_range(flat.numel(), rank, parts) for rank in range(parts)]
                    expected[name] = [digest(flat[span.start : span.stop]) for span in spans]
    merged = {name: each for mine in all_gather_json(world, expected) for name, each in mine.items()}
    different = [name for name, mine in held.items() if name in merged and merged[name][world.rank % mine.parts] != mine.digest]
    everywhere = all_gather_json(world, different)
    if any(everywhere):
        rank = next(rank for rank, names in enumerate(everywhere) if names)
        names = sorted({name for each in everywhere for name in each})
        raise CheckpointError(
            f"read back, other than the files: {', '.join(names[:5])} ({len(names)} in all, first on rank {rank}). The files "
            "changed while they were read, or storage or memory is faulty. Load again, and compare the files' checksums.",
            code="checkpoint.verification_failed",
        )
    unread = sorted(held.keys() - merged.keys())
    if unread:
        raise CheckpointError(
            f"read back, nothing was found for {', '.join(unread[:5])}. Load with --loader stock.",
            code="checkpoint.not_verified",
        )
    return len(held)


def _converted(group: TensorGroup, whole: FullShapeModel, files: "_Files") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a group makes, on real data."""
    if group.converter is None:
        yield group.name, files.tensor(next(iter(group.members)))
        return
    yield from run(group, whole, files.tensor).items()


class _Files:
    """The checkpoint's files as the libraries map them, each opened once."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._mapped: dict[str, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, whole."""
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
