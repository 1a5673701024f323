"""Quantise weights to 4 bits while they are read: each rank its own blocks.

A rank reads the elements of the blocks whose codes it keeps, a buffer at a time, and quantises them. The scales of all blocks
go to every rank, since the rank that keeps them has other codes, and double quantisation needs their mean. So the bytes are
those that one process computes from the whole weight.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zero_sft.cluster.control_group import all_gather_tensors
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.quantized import dequantize
from zero_sft.errors import ConfigError
from zero_sft.four_bit.layout import BLOCK
from zero_sft.four_bit.linear import Linear4bit, make_4bit
from zero_sft.loading.match import CheckpointMatch
from zero_sft.loading.options import LoadOptions
from zero_sft.plan.partition import FlatRange
from zero_sft.plan.plan import ReadItem, SourceMap, plan_reads
from zero_sft.storage import reader
from zero_sft.transformers_internals import quantized_linears
from zero_sft.zero import shards

_BATCH_BYTES = 256 * 2**20
"""Bytes of a rank's part of the weights, unquantised, after which the ranks exchange scales."""


def require_bitsandbytes() -> None:
    """Raise `ConfigError` if bitsandbytes is not installed. Any rank; does not communicate."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights in 4 bits need the package bitsandbytes, which is not installed: pip install bitsandbytes",
            code="config.no_bitsandbytes",
        )


def make_4bit_modules(match: CheckpointMatch, options: LoadOptions, already_complete: set[str]) -> dict[str, Linear4bit]:
    """Turn the model's linear modules into modules of 4 bits, while it is on the meta device; return them by weight's name.

    They are those that transformers quantises, without the output embeddings and tied weights. A weight stays as it is if it
    has to be initialised, or computed from whole stored tensors.

    Raises:
        ConfigError: the model has no such module.
    """
    chosen: dict[str, Linear4bit] = {}
    require_bitsandbytes()
    for prefix, module in list(quantized_linears(match.skeleton.model)):
        name = f"{prefix}.weight"
        if name in match.resolution.source_maps and name not in already_complete:
            _make_4bit(module, options, match.skeleton.state[name].dtype)
            chosen[name] = module  # type: ignore[assignment]  # it is one now
    if not chosen:
        raise ConfigError(
            f"{type(match.skeleton.model).__name__} has no linear module for 4 bits: leave --load_in_4bit out",
            code="config.nothing_in_4_bits",
        )
    return chosen


def recorded_settings(options: LoadOptions) -> dict[str, Any]:
    """Return the options on which the weights' values depend, for the record of a checkpoint. Pure."""
    if not options.load_in_4bit:
        return {}
    return {name: getattr(options, name) for name in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")}


def make_all_4bit(model: Any, options: LoadOptions) -> Any:
    """Turn the linear modules of a model on meta that will be loaded in 4 bits; return the model. Any rank."""
    for _, module in list(quantized_linears(model)) if options.load_in_4bit else ():
        _make_4bit(module, options, module.weight.dtype)
    return model


def _make_4bit(module: nn.Linear, options: LoadOptions, dtype: torch.dtype) -> None:
    make_4bit(module, dtype=dtype, quant_type=options.bnb_4bit_quant_type, double=options.bnb_4bit_use_double_quant)


def read_4bit(
    modules: Mapping[str, Linear4bit], match: CheckpointMatch, options: LoadOptions, device: torch.device, world: World
) -> list[ReadItem]:
    """Read, quantise and keep this rank's part of the modules' weights. Every rank; communicates.

    Args:
        device: where the elements are quantised.

    Returns:
        The reads.
    """
    quantizer = _Quantizer(match, options, device, world)
    total = sum(module.layout.weight_numel for module in modules.values())
    with progress.task("quantising the weights", total) as task:
        for batch in _batches(modules, match, world.world_size):
            with collective_stage(world, "quantising the weights", timeout_for_bytes(match.index.nbytes)):
                own = [quantizer.quantize_own_blocks(name, module) for name, module in batch.items()]
            exchanged = all_gather_tensors(world, torch.cat([scales.cpu() for _, scales in own]))
            with collective_stage(world, "keeping the quantised weights"):
                quantizer.keep(batch, [codes for codes, _ in own], exchanged)
            task.advance(sum(module.layout.weight_numel for module in batch.values()))
    return quantizer.reads


def _batches(modules: Mapping[str, Linear4bit], match: CheckpointMatch, ranks: int) -> Iterator[dict[str, Linear4bit]]:
    """Yield the modules in the order of their weights in the files, in batches that are the same on all ranks."""

    def position(name: str) -> tuple[str, int]:
        region = match.resolution.source_maps[name].regions[0]
        stored = match.resolution.stored_tensors[region.source]
        return stored.file, stored.offset_bytes

    batch: dict[str, Linear4bit] = {}
    nbytes = 0
    for name in sorted(modules, key=position):
        batch[name] = modules[name]
        nbytes += match.skeleton.state[name].nbytes // ranks
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = {}, 0
    if batch:
        yield batch


class _Quantizer:
    """Quantises a rank's part of weights, one after the other."""

    def __init__(self, match: CheckpointMatch, options: LoadOptions, device: torch.device, world: World) -> None:
        self.reads: list[ReadItem] = []
        self._match = match
        self._threads = options.reading_threads(world.cpu_cores)
        self._buffer_bytes = options.buffer_mib * 2**20
        self._device = device
        self._world = world

    def quantize_own_blocks(self, name: str, module: Linear4bit) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes of this rank's own blocks, and their scales, padded to the same size on all ranks."""
        from zero_sft.four_bit import kernels

        blocks = self._own_blocks(module, self._world.rank)
        codes, scales = [], []
        for part in self._parts(blocks, module.weight.element_size()):
            values = self._read(name, module, module.layout.elements_of(part))
            part_codes, part_scales = kernels.quantize(values, module.quant_type)
            codes.append(part_codes)
            scales.append(part_scales)
        padding = torch.zeros(self._padded_blocks(module) - blocks.numel, dtype=torch.float32, device=self._device)
        no_codes = torch.zeros(0, dtype=torch.uint8, device=self._device)
        return torch.cat([no_codes, *codes]), torch.cat([*scales, padding])

    def keep(self, batch: Mapping[str, Linear4bit], codes: Sequence[torch.Tensor], exchanged: Sequence[torch.Tensor]) -> None:
        """Make the bytes of this rank's range the modules' shards.

        Args:
            codes: of the rank's own blocks, by module.
            exchanged: the scales of each rank's own blocks, of one module after the other.
        """
        sizes = [self._padded_blocks(module) for module in batch.values()]
        by_rank = [scales.split(sizes) for scales in exchanged]
        own = {
            name: self._own_part(module, own_codes, [parts[number] for parts in by_rank])
            for number, ((name, module), own_codes) in enumerate(zip(batch.items(), codes, strict=True))
        }

        def fill(memory: Mapping[str, torch.Tensor]) -> None:
            for name, shard in memory.items():
                shard.view(torch.uint8)[: len(own[name])].copy_(own[name])

        params: dict[str, Any] = {name: module.weight for name, module in batch.items()}
        shards.fill_shards(params, fill)

    def _own_part(self, module: Linear4bit, codes: torch.Tensor, scales_of_ranks: list[torch.Tensor]) -> torch.Tensor:
        """Return the bytes of this rank's range: what it keeps of the codes, then of the scales."""
        from zero_sft.four_bit import kernels

        layout = module.layout
        scales = torch.empty(layout.blocks, dtype=torch.float32)
        for rank, part in enumerate(scales_of_ranks):
            blocks = self._own_blocks(module, rank)
            scales[blocks.start : blocks.stop] = part[: blocks.numel]
        own = layout.own_bytes(self._world.rank, self._world.world_size, module.weight.element_size())
        first_code = self._own_blocks(module, self._world.rank).start * (BLOCK // 2)
        own_codes = codes[own.start - first_code : min(own.stop, layout.code_bytes) - first_code]
        first_scale = max(own.start, layout.code_bytes) - layout.code_bytes
        if own.stop <= layout.code_bytes:
            return own_codes
        scale_bytes = kernels.scale_bytes(scales.to(self._device), layout)
        return torch.cat([own_codes, scale_bytes[first_scale : own.stop - layout.code_bytes]])

    def _own_blocks(self, module: Linear4bit, rank: int) -> FlatRange:
        return module.layout.own_blocks(rank, self._world.world_size, module.weight.element_size())

    def _padded_blocks(self, module: Linear4bit) -> int:
        return max(self._own_blocks(module, rank).numel for rank in range(self._world.world_size))

    def _parts(self, blocks: FlatRange, itemsize: int) -> Iterator[FlatRange]:
        """Yield ranges of blocks whose elements fill the buffer."""
        step = max(1, self._buffer_bytes // (BLOCK * itemsize))
        for start in range(blocks.start, blocks.stop, step):
            yield FlatRange(start=start, stop=min(start + step, blocks.stop))

    def _read(self, name: str, module: Linear4bit, elements: FlatRange) -> torch.Tensor:
        """Read elements of a weight, in its dtype."""
        source_map: SourceMap = self._match.resolution.source_maps[name]
        planned = plan_reads([(source_map, elements)], self._match.resolution.stored_tensors)
        values = torch.zeros(elements.numel, dtype=self._match.skeleton.state[name].dtype, device=self._device)
        reader.fill(planned, {name: values}, self._threads, self._match.index.identities, dequantize)
        self.reads.extend(planned)
        return values
