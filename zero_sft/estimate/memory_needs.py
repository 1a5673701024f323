"""Estimate the memory of one run, whether it fits, and which changes would make it fit."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zero_sft.adapters.options import LoraOptions
from zero_sft.ds_config import engine_dtype, load_ds_config
from zero_sft.estimate.activations import peak_bytes
from zero_sft.estimate.engine_memory import Memory, Sizes, checkpoint_copy_bytes, training_memory, zero_settings
from zero_sft.estimate.model import EstimatedModel
from zero_sft.loading.four_bit import make_all_4bit
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta
from zero_sft.rope import text_config
from zero_sft.saving.checkpoint_saver import MEMORY_SHARE

RUNTIME_BYTES = 3 * 2**29
"""Device memory for the driver, NCCL and kernel workspaces, about 1.5 GiB."""

INTERPRETER_BYTES = 5 * 2**28
"""Host memory of each rank for Python with torch, transformers and DeepSpeed, about 1.25 GiB."""

LARGEST_WORLD = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """Settings of a training run; memory sizes in bytes, of one device and of the host of one node."""

    world_size: int
    ranks_per_node: int
    ds_config: str | Mapping[str, Any]
    batch_size: int
    length: int
    checkpointing: bool
    packing: bool
    device_bytes: int
    host_bytes: int
    save_async: bool | Literal["auto"] = "auto"
    sequence_parallel_size: int = 1
    tiled_mlp: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """Memory that a run needs: bytes on one device, and on the host of one node."""

    memory: Memory
    device: int
    host: int
    fits: bool


class MemoryModel:
    """Memory model of a training. Activations are counted once per batch shape and cached."""

    def __init__(self, model: EstimatedModel, lora: LoraOptions | None = None, load_options: LoadOptions | None = None) -> None:
        """Take a model, the adapters that are trained, and whether the model is in 4 bits.

        Raises:
            ArgumentError: the model has no modules for these adapters.
        """
        self._model = model
        self._peak_bytes = functools.cache(
            functools.partial(peak_bytes, model.spec, lora=lora, load_options=load_options, fused_head=True)
        )
        self._numels = [param.numel() for param in model.parameters.values()]
        self._trained_numels: list[int] | None = None
        if lora is not None and lora.enabled:
            from zero_sft.adapters.attach import adapted_on_meta, lora_config  # PEFT, which other estimates do not need

            base = make_all_4bit(build_on_meta(model.spec)[0], load_options or LoadOptions())
            params = list(adapted_on_meta(base, lora_config(lora)).parameters())
            self._numels = [param.numel() for param in params]
            self._trained_numels = [param.numel() for param in params if param.requires_grad]

    @property
    def trained_numel(self) -> int | None:
        """Elements of the adapters; None without adapters."""
        return None if self._trained_numels is None else sum(self._trained_numels)

    def activation_bytes(self, run: TrainingRun) -> int:
        """Return a rank's activation bytes of one pass. Packed rows add a mask of (length, length) that separates samples."""
        mask = 3 * run.batch_size * run.length**2 if run.packing else 0  # 1 byte as booleans, 2 bytes added to the scores
        # Attention sees the whole length of a part of the heads: as many bytes as a part of the length of all heads.
        length = -(-run.length // run.sequence_parallel_size)
        return mask + self._peak_bytes(
            batch_size=run.batch_size, length=length, checkpointing=run.checkpointing, tiled_mlp=run.tiled_mlp
        )

    @property
    def spec(self) -> ModelSpec:
        """The model before its weights are read."""
        return self._model.spec

    def sizes(self, itemsize: int, activation_bytes: int) -> Sizes:
        """Return the sizes of the model, with its adapters."""
        return Sizes(
            numels=self._numels, trained_numels=self._trained_numels, itemsize=itemsize, activation_bytes=activation_bytes
        )

    def needs(self, run: TrainingRun) -> MemoryNeeds:
        """Estimate the memory of a run.

        Raises:
            ConfigError: the DeepSpeed config can't be used, or the model's activations can't be counted.
        """
        ds = load_ds_config(run.ds_config)
        dtype = engine_dtype(ds, str(self._model.spec.dtype).removeprefix("torch."))
        sizes = self.sizes(getattr(torch, dtype).itemsize, self.activation_bytes(run))
        zero = zero_settings(ds, text_config(self._model.spec.config).hidden_size)
        memory = training_memory(sizes, zero, run.world_size)
        ranks = min(run.ranks_per_node, run.world_size)
        copied = ranks * checkpoint_copy_bytes(sizes, zero, run.world_size)
        if self._copies(run, zero, copied, run.host_bytes - ranks * (memory.host_peak + INTERPRETER_BYTES)):
            memory = dataclasses.replace(memory, host={**memory.host, "copy for checkpoints": copied // ranks})
        device = memory.device_peak + RUNTIME_BYTES
        host = ranks * (memory.host_peak + INTERPRETER_BYTES)
        fits = device <= run.device_bytes and host <= run.host_bytes
        return MemoryNeeds(memory=memory, device=device, host=host, fits=fits)

    @staticmethod
    def _copies(run: TrainingRun, zero: Any, copied: int, available: int) -> bool:
        """Return whether a run copies its checkpoints to host memory, as `CheckpointSaver` decides."""
        if run.save_async != "auto":
            return run.save_async
        on_nvme = zero.offload_optimizer is not None and zero.offload_optimizer.device == "nvme"
        return not on_nvme and copied <= MEMORY_SHARE * available

    def remedies(self, run: TrainingRun) -> Iterator[str]:
        """Yield changes that would make a run fit, the cheapest first, as arguments of the job or a number of GPUs."""
        cuts: dict[str, dict[str, Any]] = {}
        if not run.checkpointing:
            cuts["--activation_checkpointing True"] = {"checkpointing": True}
        if run.batch_size > 1:
            cuts["--per_device_train_batch_size 1"] = {"batch_size": 1}
        alone = True  # more GPUs or another config is enough, without the cuts
        if cuts:
            all_words, all_cuts = " ".join(cuts), {key: value for cut in cuts.values() for key, value in cut.items()}
            enough = self._first_that_fits(run, {**cuts, all_words: all_cuts})
            if enough:
                yield enough
            else:
                run, alone = dataclasses.replace(run, **all_cuts), False
        doubled = [run.world_size << doublings for doublings in range(1, LARGEST_WORLD.bit_length())]
        with_cuts, after_cuts = ("", "") if alone else (f" with {' '.join(cuts)}", f"{' '.join(cuts)} ")
        worlds = {f"{size:,} GPUs{with_cuts}": {"world_size": size} for size in doubled if size <= LARGEST_WORLD}
        configs = {
            f"{after_cuts}--deepspeed {name}": {"ds_config": name}
            for name in ("zero3_offload", "zero3_nvme")
            if name != run.ds_config
        }
        for changes in (worlds, configs):
            enough = self._first_that_fits(run, changes)
            if enough:
                yield enough

    def _first_that_fits(self, run: TrainingRun, changes: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the words of the first change with which the run fits."""
        return next((words for words, change in changes.items() if self.needs(dataclasses.replace(run, **change)).fits), None)
