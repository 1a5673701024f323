"""Load a located model directly into ZeRO-3 shards.

`load_model_from` resolves the engine's settings, lets `sharded.py` or `stock.py` load the weights, and attaches the report.
Every rank runs all of it. At the end of each `collective_stage`, all ranks go on or all raise the same error.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from zero_sft import transformers_internals
from zero_sft.cluster.control_group import all_gather_json, bytes_communicated
from zero_sft.cluster.stages import collective_stage, dotted
from zero_sft.cluster.world import World
from zero_sft.config import config_settings, prepare_config_from
from zero_sft.ds_config import load_ds_config, resolve_auto, settings_to_match
from zero_sft.ds_features import contradictions, refused_features
from zero_sft.errors import ConfigError
from zero_sft.hub.source import ModelSource, fetch_weights
from zero_sft.loading.dtype import weights_dtype
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.report import KeyReport, LoadReport, LoadStats
from zero_sft.loading.request import LoadRequest, ModelSpec
from zero_sft.loading.sharded import load_sharded
from zero_sft.loading.stock import load_stock
from zero_sft.storage.memory_snapshot import MemorySnapshot
from zero_sft.zero import internals

logger = logging.getLogger(__name__)


def load_model_from(
    source: ModelSource,
    world: World,
    *,
    ds_config: str | Path | Mapping[str, Any],
    config: PreTrainedConfig | None,
    options: LoadOptions,
    model_class: Any = None,
    while_reading: Callable[[], object] | None = None,
) -> PreTrainedModel:
    """Load a located model with checked options, as `load_model` does. Every rank; communicates."""
    sent_before = bytes_communicated()
    folder = fetch_weights(source, world)
    if config is None:
        config = prepare_config_from(source, world)
    resolved_ds_config, dtype, seed = _resolve_engine_settings(ds_config, options, config, world)
    for warning in filter(None, (internals.untested(), transformers_internals.untested())):
        if world.is_main:
            logger.warning(warning)
    request = LoadRequest(
        name=source.name,
        model=ModelSpec(
            folder=folder,
            config=config,
            dtype=getattr(torch, dtype),
            model_class=model_class,
            attn_implementation=options.attn_implementation,
            trust_remote_code=source.options.trust_remote_code,
        ),
        ds_config=resolved_ds_config,
        seed=seed,
        variant=source.options.variant,
        options=options,
        while_reading=while_reading,
    )
    start = MemorySnapshot.now()
    model, keys, stats = (load_stock if options.loader == "stock" else load_sharded)(request, world)
    peak_host, peak_device = MemorySnapshot.now().growth_since(start)
    stats = dataclasses.replace(
        stats, bytes_communicated=bytes_communicated() - sent_before, peak_host_bytes=peak_host, peak_device_bytes=peak_device
    )
    _attach_report(model, request, keys, stats, world)
    return model


def _resolve_engine_settings(
    ds_config: str | Path | Mapping[str, Any], options: LoadOptions, config: PreTrainedConfig, world: World
) -> tuple[dict[str, Any], str, int]:
    """Return the DeepSpeed config without "auto", its engine's dtype name and rank 0's seed. Every rank; communicates.

    Raises:
        ConfigError: the config can't be used.
        DistributedError: the ranks have different DeepSpeed or model configs.
    """
    with collective_stage(world, "reading the DeepSpeed config") as exchange:
        exchange.local = torch.initial_seed()
        loaded = load_ds_config(ds_config)
        dtype_name = weights_dtype(options.dtype, config, loaded)
        resolved = resolve_auto(loaded, dtype_name, world.node_group_size, world.world_size)
        for error in (*refused_features(resolved), *contradictions(resolved)):
            raise error
        if options.load_in_4bit:
            _require_exact_gathers(resolved)
        settings = dotted({"ds_config": settings_to_match(resolved), "config": config_settings(config)})
        exchange.must_match = ("settings of the load", settings)
    return resolved, dtype_name, exchange.gathered[0]


def _require_exact_gathers(ds_config: Mapping[str, Any]) -> None:
    """Refuse a config by which DeepSpeed quantises what it gathers: codes of 4 bits would become other codes."""
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if ds_config["zero_optimization"].get(key):
            raise ConfigError(
                f"the DeepSpeed config sets zero_optimization.{key}, which would change weights that are in 4 bits. Leave it "
                "out, or leave load_in_4bit out.",
                code="ds_config.quantises_4_bits",
            )


def _attach_report(model: PreTrainedModel, request: LoadRequest, keys: KeyReport, stats: LoadStats, world: World) -> None:
    """Attach the report to the model and log it on rank 0. Every rank; communicates."""
    model.name_or_path = model.config.name_or_path = request.name
    report = LoadReport(
        loader=request.options.loader,
        model=request.name,
        dtype=str(request.model.dtype).removeprefix("torch."),
        rank=world.rank,
        world_size=world.world_size,
        ranks=all_gather_json(world, stats.numbers()),
        **vars(keys),
        **vars(stats),
    )
    setattr(model, "load_report", report)  # noqa: B010 - nn.Module's type stub does not declare it
    if world.is_main:
        logger.info(report.summary())
