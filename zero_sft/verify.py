"""Read back: is what the ranks hold what the files say? Along another path than the load's.

The load plans byte ranges by tracing and reads them itself. Here the stored tensors are read whole by the libraries
(safetensors, `torch.load`), converted by transformers' own operations on real data, cut as ZeRO-3 cuts and hashed; each rank
hashes the shards that it holds; the two must be equal. The model's tensors are shared out among the ranks, so every byte is
read once more in the whole cluster, and a rank holds one tensor's sources at a time.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft import distributed
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.conversion.keys import Group
from zero_sft.distributed import World, agreed
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import shard_range


def verify(
    whole: PreTrainedModel,
    groups: Sequence[Group],
    stored: Mapping[str, StoredTensor],
    held: Mapping[str, torch.Tensor],
    partitions: Mapping[str, int],
    world: World,
) -> int:
    """Compare every loaded tensor with the files. Every rank; communicates hashes.

    Args:
        whole: the model on the meta device, unpartitioned: operations ask it for shapes.
        groups: which stored tensors make which of the model's.
        held: this rank's real elements, flat, of each tensor to be checked.
        partitions: into how many parts each of those is cut; 1 for what every rank has whole.

    Returns:
        The number of tensors checked.

    Raises:
        CheckpointError: on every rank, naming the tensors and ranks that differ.
    """
    expected: dict[str, list[str]] = {}
    with agreed(world, "reading the checkpoint back"):
        for group in groups[world.rank :: world.world_size]:
            for name, tensor in _converted(group, whole, stored, held):
                flat = tensor.reshape(-1)
                parts = partitions[name]
                spans = [shard_range(flat.numel(), rank, parts) for rank in range(parts)]
                expected[name] = [_hash(flat[span.start : span.stop]) for span in spans]
    merged = {name: each for mine in distributed.exchange(world, expected) for name, each in mine.items()}
    different = []
    for name, tensor in held.items():
        part = 0 if partitions[name] == 1 else world.rank % partitions[name]
        if name in merged and merged[name][part] != _hash(tensor):
            different.append(name)
    everywhere = distributed.exchange(world, different)
    if any(everywhere):
        rank = next(rank for rank, names in enumerate(everywhere) if names)
        names = sorted({name for each in everywhere for name in each})
        raise CheckpointError(
            f"read back, {len(names)} tensors differ from the files: {', '.join(names[:5])} (first on rank {rank}). The files "
            "changed while they were read, or storage or memory is faulty. Load again, and compare the files' checksums."
        )
    unread = sorted(held.keys() - merged.keys())
    if unread:
        raise CheckpointError(f"read back, nothing was found for {', '.join(unread[:5])}. Load with --loader stock.")
    return len(held)


def _converted(
    group: Group, whole: PreTrainedModel, stored: Mapping[str, StoredTensor], held: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a group makes, on real data, in the dtype in which they are held."""
    if group.converter is None:
        result: Mapping[str, Any] = {group.name: _load(stored[next(iter(group.members))])}
    else:
        converter = copy.deepcopy(group.converter)
        wanted = whole.get_parameter_or_buffer(group.name).dtype
        for pattern, names in group.members.items():
            for name in names:
                converter.add_tensor(group.name, name, pattern, _load(stored[name]).to(wanted))
        result = converter.convert(group.name, model=whole, config=whole.config)
    for name, value in result.items():
        if name in held:
            tensor = value[0] if isinstance(value, list) else value
            yield name, tensor.to(held[name].dtype)


def _load(tensor: StoredTensor) -> torch.Tensor:
    if tensor.file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(tensor.file, framework="pt") as file:
            return file.get_tensor(tensor.name)
    return torch.load(tensor.file, map_location="cpu", weights_only=True, mmap=True)[tensor.name].detach()


def _hash(tensor: torch.Tensor) -> str:
    data: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=12).hexdigest()
