"""The memory of one run: what it is, what it needs, whether it fits, and what would."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zero_sft.config import text_config
from zero_sft.ds_config import engine_dtype, load_ds_config
from zero_sft.estimate.activations import peak_bytes
from zero_sft.estimate.engine_memory import Memory, Sizes, training_memory, zero_settings
from zero_sft.estimate.model import EstimatedModel

RUNTIME_BYTES = 3 * 2**29
"""What a GPU's driver, NCCL and the kernels' workspaces take of a device, about 1.5 GiB."""

INTERPRETER_BYTES = 5 * 2**28
"""Python with torch, transformers and DeepSpeed on the host, a rank, about 1.25 GiB."""

LARGEST_WORLD = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How the training is run; sizes of memory in bytes, of one device and of one node's host."""

    world_size: int
    ranks_per_node: int
    ds_config: str | Mapping[str, Any]
    batch_size: int
    length: int
    checkpointing: bool
    packing: bool
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What a run needs: of one device, and of one node's host."""

    memory: Memory
    device: int
    host: int
    fits: bool


class MemoryModel:
    """A model as it would be trained. Activations are counted once for each size of a batch."""

    def __init__(self, of: EstimatedModel) -> None:
        self._of = of
        self._counted: dict[tuple[int, int, bool], int] = {}

    def activation_bytes(self, run: Run) -> int:
        """Activations of one pass of a rank. Packed rows take a mask that keeps them apart, of each token by each."""
        mask = 3 * run.batch_size * run.length**2 if run.packing else 0  # as booleans, and in 16 bits beside the scores
        key = (run.batch_size, run.length, run.checkpointing)
        if key not in self._counted:
            self._counted[key] = peak_bytes(
                self._of.spec, batch_size=run.batch_size, length=run.length, checkpointing=run.checkpointing
            )
        return mask + self._counted[key]

    def needs(self, run: Run) -> MemoryNeeds:
        """Count the memory of a run.

        Raises:
            ConfigError: a DeepSpeed config that can't be used, or a model whose activations can't be counted.
        """
        ds = load_ds_config(run.ds_config)
        dtype = engine_dtype(ds, str(self._of.spec.dtype).removeprefix("torch."))
        sizes = Sizes(
            numels=[each.numel() for each in self._of.parameters.values()],
            itemsize=getattr(torch, dtype).itemsize,
            activation_bytes=self.activation_bytes(run),
        )
        zero = zero_settings(ds, text_config(self._of.config).hidden_size)
        memory = training_memory(sizes, zero, run.world_size)
        device = memory.device_peak + RUNTIME_BYTES
        host = min(run.ranks_per_node, run.world_size) * (memory.host_peak + INTERPRETER_BYTES)
        fits = device <= run.device_bytes and host <= run.host_bytes
        return MemoryNeeds(memory=memory, device=device, host=host, fits=fits)

    def remedies(self, run: Run) -> Iterator[str]:
        """Changes of a run that would make it fit, the least painful first, each in the words of the job's arguments."""
        changes: list[tuple[str, dict[str, Any]]] = []
        if not run.checkpointing:
            changes.append(("--activation_checkpointing True", {"checkpointing": True}))
        if run.batch_size > 1:
            changes.append(("--per_device_train_batch_size 1", {"batch_size": 1}))
        everything = {key: value for _, change in changes for key, value in change.items()}
        if len(changes) > 1:
            changes.append((" ".join(text for text, _ in changes), everything))
        found = False
        for text, change in changes:
            if not found and self.needs(dataclasses.replace(run, **change)).fits:
                found = True
                yield text
        easiest = dataclasses.replace(run, **everything)
        words = " ".join(text for text, _ in changes[:2]) + " " if changes and not found else ""
        size = run.world_size * 2
        while size <= LARGEST_WORLD:
            if self.needs(dataclasses.replace(easiest, world_size=size)).fits:
                yield f"{words}{size} GPUs"
                break
            size *= 2
        for name in ("zero3_offload", "zero3_nvme"):
            if name != run.ds_config and self.needs(dataclasses.replace(easiest, ds_config=name)).fits:
                yield f"{words}--deepspeed {name}"
                break
