"""Read an adapter's tensors from its folder, each rank its own ranges. The folder is as PEFT's `save_pretrained` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero_sft.adapters import peft_internals
from zero_sft.checkpoint.file_identity import stat_identity
from zero_sft.checkpoint.folder_kind import ADAPTER_FILE
from zero_sft.checkpoint.header import StoredTensor, read_header
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.plan.plan import SourceMap, plan_reads
from zero_sft.plan.regions import identity_regions
from zero_sft.printable import first_of
from zero_sft.storage import reader
from zero_sft.zero import shards


def adapter_file(folder: Path) -> Path:
    """Return the file with an adapter's weights.

    Raises:
        CheckpointError: it is not there.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        has_bin = (folder / "adapter_model.bin").is_file()
        remedy = "Load adapter_model.bin with PEFT, and save it." if has_bin else "Name the folder of an adapter."
        raise CheckpointError(f"{folder} has no {ADAPTER_FILE}. {remedy}", code="adapter.no_weights")
    return path


def read_adapter_header(folder: Path, expected: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the tensors in an adapter's file. Any rank; does not communicate.

    Args:
        expected: the tensors of the model's adapter, by saved name.

    Raises:
        CheckpointError: the file can't be read, or has other tensors.
    """
    path = adapter_file(folder)
    stored = read_header(path)
    shapes = {name: shards.full_shape(tensor) for name, tensor in expected.items()}
    different = [name for name, shape in shapes.items() if name in stored and stored[name].shape != shape]
    for problem, names in (
        ("lacks", shapes.keys() - stored.keys()),
        ("has what the model has no place for,", stored.keys() - shapes.keys()),
        ("has in another shape", different),
    ):
        if names:
            raise CheckpointError(
                f"{path} {problem} {first_of(sorted(names))}. Give the model to which the adapter belongs.",
                code="adapter.other_model",
            )
    return stored


def load_adapter(model: Any, folder: Path, world: World) -> None:
    """Give a model's adapter the values in a folder. Every rank; communicates.

    Raises:
        CheckpointError: the file can't be read, or has other tensors. The same on every rank.
    """
    tensors = peft_internals.saved_tensors(model)
    nbytes = sum(shards.full_numel(tensor) * tensor.element_size() for tensor in tensors.values())
    with collective_stage(world, f"reading the adapter in {folder}", timeout_for_bytes(nbytes)):
        stored = read_adapter_header(folder, tensors)
        identities = {str(folder / ADAPTER_FILE): stat_identity(folder / ADAPTER_FILE)}
        for name, tensor in tensors.items():
            shape = shards.full_shape(tensor)
            source_map = SourceMap.of(name, shape, identity_regions(name, shape))
            with shards.new_part(tensor) as (flat_range, values):
                reader.fill(plan_reads([(source_map, flat_range)], stored), {name: values}, identities=identities)
