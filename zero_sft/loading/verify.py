"""Verify a load: compare the shards that the ranks hold with the files, by code that is independent of the load's.

The load plans byte ranges by tracing and reads them itself. Here safetensors and `torch.load` read the stored tensors whole,
and transformers' operations convert the real data. The results are partitioned as in ZeRO-3 and hashed. Each rank hashes the
shards that it holds, and the hashes must be equal. Each rank checks a part of the model's tensors, so the cluster reads every
byte once more, and a rank holds the sources of one tensor at a time.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open

from zero_sft.checkpoint.file_identity import require_unchanged
from zero_sft.checkpoint.index import CheckpointIndex
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.conversion.convert import convert_group
from zero_sft.errors import CheckpointError
from zero_sft.loading.match import CheckpointMatch
from zero_sft.plan.partition import shard_range
from zero_sft.printable import first_of
from zero_sft.zero import shards


def digest(tensor: torch.Tensor) -> str:
    """Hash a tensor's elements in row-major order."""
    data: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def verify(match: CheckpointMatch, names: Collection[str], world: World) -> int:
    """Compare the loaded tensors `names` with the files. Every rank; communicates hashes.

    Returns:
        The number of tensors checked.

    Raises:
        CheckpointError: on every rank, naming the tensors and ranks that differ.
    """
    tensors = {name: tensor for name, tensor in match.collect_tensors().items() if name in names}
    with collective_stage(world, "hashing the shards"):
        held = {name: _shard_digest(tensor) for name, tensor in tensors.items()}
    with collective_stage(world, "reading the checkpoint back", timeout_for_bytes(match.index.nbytes)) as exchange:
        exchange.local = _digests_of_files(match, tensors, world)
    expected: dict[str, list[str]] = {}
    for rank_digests in exchange.gathered:
        expected |= rank_digests
    different = [name for name, digests in expected.items() if digests[shards.partition_index(tensors[name])] != held[name]]
    different_by_rank = all_gather_json(world, different)
    if any(different_by_rank):
        rank = next(rank for rank, rank_names in enumerate(different_by_rank) if rank_names)
        wrong = sorted(set().union(*different_by_rank))
        raise CheckpointError(
            f"the loaded weights differ from the files: {first_of(wrong, 5)} ({len(wrong)} in all, first on rank {rank}). "
            "The files changed while they were read, or storage or memory is faulty. Load again, and compare file checksums.",
            code="checkpoint.verification_failed",
        )
    unread = sorted(held.keys() - expected.keys())
    if unread:
        raise CheckpointError(
            f"the files could not be compared with {first_of(unread, 5)}. Load with --loader stock.",
            code="checkpoint.not_verified",
        )
    return len(held)


def _shard_digest(tensor: Any) -> str:
    """Hash this rank's part of a tensor. A shard on NVMe is in memory only during this call."""
    if not shards.is_sharded(tensor):
        return digest(tensor)
    try:
        return digest(shards.local_shard(tensor))
    finally:
        shards.release_shard(tensor)


def _digests_of_files(match: CheckpointMatch, tensors: Mapping[str, Any], world: World) -> dict[str, list[str]]:
    """Convert a part of the stored tensors, with their real data, and hash the shard of every rank. Does not communicate."""
    read = _stored_reader(match.index)
    digests: dict[str, list[str]] = {}
    for group in match.resolution.groups[world.rank :: world.world_size]:
        if group.converter is None:
            converted = {group.name: read(group.stored_names[0])}
        else:
            converted = convert_group(group, match.full_shape_model, read)
        for name in converted.keys() & tensors.keys():
            flat = converted[name].to(tensors[name].dtype).reshape(-1)
            parts = shards.num_partitions(tensors[name])
            ranges = [shard_range(flat.numel(), rank, parts) for rank in range(parts)]
            digests[name] = [digest(flat[part.start : part.stop]) for part in ranges]
    return digests


def _stored_reader(index: CheckpointIndex) -> Callable[[str], torch.Tensor]:
    """Return a function that reads one stored tensor whole. It opens each file once, with the library of its format."""

    @functools.cache
    def open_file(path: str) -> Any:
        require_unchanged(path, path, index.identities.get(path))
        if path.endswith(".safetensors"):
            return safe_open(path, framework="pt")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def read(name: str) -> torch.Tensor:
        path = index.tensors[name].file
        file = open_file(path)
        return file.get_tensor(name) if path.endswith(".safetensors") else file[name].detach()

    return read
