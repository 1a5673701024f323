"""Public functions that load a model, or a model and its tokenizer, directly into ZeRO-3 shards.

`load_model` locates the model, resolves the engine's settings, lets `sharded.py` or `stock.py` load the weights, and attaches
the report. Every rank runs all of it. At the end of each `collective_stage`, all ranks go on or all raise the same error.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zero_sft import transformers_internals
from zero_sft.cluster.control_group import all_gather_json, bytes_communicated
from zero_sft.cluster.stages import collective_stage, dotted
from zero_sft.cluster.world import World
from zero_sft.config import config_settings, prepare_config_from
from zero_sft.ds_config import load_ds_config, resolve_auto, settings_to_match
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import ModelSource, agree_on_source, fetch_weights, local_folder, require_name
from zero_sft.loading.dtype import weights_dtype
from zero_sft.loading.options import LoadOptions, without_removed_options
from zero_sft.loading.report import KeyReport, LoadReport, LoadStats
from zero_sft.loading.request import LoadRequest, ModelSpec
from zero_sft.loading.sharded import load_sharded
from zero_sft.loading.stock import load_stock
from zero_sft.options.keywords import read_keywords, require_instance, takes_options, wrong_value
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.storage.memory_snapshot import MemorySnapshot
from zero_sft.zero import internals
from zero_sft.zero.process_group import connect

logger = logging.getLogger(__name__)


@takes_options(LoadOptions, HubOptions)
@cpu_by_default()
def load_pretrained(
    model_name_or_path: str,
    *,
    ds_config: str | Path | Mapping[str, Any],
    model_max_length: int = 512,
    rope_parameters: dict | None = None,
    model_class: Any = None,
    padding_side: str = "right",
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load config, model and tokenizer under ZeRO-3, as FastChat's training sets them up. Every rank; communicates.

    Takes the arguments of `prepare_config`, `load_model` (except `config` and `while_reading`) and `load_tokenizer`, and raises
    their errors. Rank 0 sets the tokenizer up while the weights are read.
    """
    from zero_sft.tokenizer import TokenizerSpec, broadcast_tokenizer  # a model alone needs no tokenizer libraries

    load_options, source, world = _join_and_locate(model_name_or_path, options, load_pretrained, model_class=model_class)
    config = prepare_config_from(source, world, model_max_length=model_max_length, rope_parameters=rope_parameters)
    spec = TokenizerSpec.of(source, model_max_length, padding_side)
    prepare = functools.partial(spec.prepare, source)
    futures: list[Future] = []  # on rank 0 the tokenizer's, once the sharded loader reads; the stock loader starts none
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:

        def start_tokenizer() -> None:
            if world.is_main:
                futures.append(pool.submit(prepare))

        model = load_model_from(
            source,
            world,
            ds_config=ds_config,
            config=config,
            options=load_options,
            model_class=model_class,
            while_reading=start_tokenizer,
        )
        tokenizer = broadcast_tokenizer(world, spec, futures[0].result if futures else prepare)
    return model, tokenizer


@takes_options(LoadOptions, HubOptions)
@cpu_by_default()
def load_model(
    model_name_or_path: str,
    *,
    ds_config: str | Path | Mapping[str, Any],
    config: PreTrainedConfig | None = None,
    model_class: Any = None,
    while_reading: Callable[[], object] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model partitioned by ZeRO-3, every rank reading its own bytes. Every rank; communicates (no weights).

    Args:
        model_name_or_path: a local folder, or a hub id, which is downloaded once per file system.
        ds_config: a DeepSpeed config of stage 3: a dict, the path of a JSON file, or a shipped name. "auto" is fine.
        config: the model's config, as `prepare_config` returns it; None reads the folder's config.json.
        model_class: a model class or an Auto class; None is `AutoModelForCausalLM`.
        while_reading: called on every rank when the sharded loader begins to read. It may start other work on a thread, since
            the host does nothing else until the weights are loaded. It must not communicate.
        dtype: "auto", a torch dtype or its name. It applies where the DeepSpeed config says "auto"; elsewhere the config
            decides, and another dtype is an error.
        attn_implementation: as in transformers ("sdpa", "eager", "flash_attention_2", ...).
        loader: "sharded", or "stock" for transformers' own loader, which ignores the next four options.
        strict: raise an error if a name is missing or unexpected.
        verify: read the checkpoint back and compare hashes with every shard, by code that is independent of the load's.
        ignore_mismatched_sizes: initialise tensors whose stored shape differs from the model's, instead of raising an error.
        buffer_mib: MiB that the load may hold next to its shards, at least 16. One reading thread takes 16 MiB; there
            are at most as many threads as cores. Modules being initialised and tensors computed once per node do not count.
        trust_remote_code, cache_dir, revision, token, local_files_only, subfolder, variant: as in `from_pretrained`.

    Returns:
        An ordinary `PreTrainedModel` in evaluation mode, ready for `forward`, `generate`, `deepspeed.initialize` and
        `Trainer`. `model.load_report` is a `LoadReport`.

    Raises:
        ZeroSftError: the same one on every rank; its class and `code` identify the problem.
    """
    load_options, source, world = _join_and_locate(
        model_name_or_path, options, load_model, model_class=model_class, config=config, while_reading=while_reading
    )
    return load_model_from(
        source,
        world,
        ds_config=ds_config,
        config=config,
        options=load_options,
        model_class=model_class,
        while_reading=while_reading,
    )


def _join_and_locate(
    model_name_or_path: str,
    options: Mapping[str, Any],
    function: Callable[..., Any],
    *,
    model_class: Any,
    config: PreTrainedConfig | None = None,
    while_reading: Callable[[], object] | None = None,
) -> tuple[LoadOptions, ModelSource, World]:
    """Join the ranks, check and compare the arguments of a public function, and locate the model. Every rank; communicates.

    Raises:
        ArgumentError: an argument has another type or is out of range.
        DistributedError: the ranks have different arguments.
    """
    world = connect(World.detect())
    with collective_stage(world, f"looking for {model_name_or_path}") as exchange:
        load_options, hub_options = read_keywords(without_removed_options(options), LoadOptions, HubOptions, function=function)
        name = require_name(model_name_or_path)
        require_instance("config", config, PreTrainedConfig, "a config object, as prepare_config returns it, or None")
        if while_reading is not None and not callable(while_reading):
            raise wrong_value("while_reading", while_reading, "a function without arguments, or None")
        folder = local_folder(name, hub_options)
        exchange.local = folder is not None
        kinds = {
            "model_class": _name_of(AutoModelForCausalLM if model_class is None else model_class),
            "config": _name_of(None if config is None else type(config)),
        }
        arguments = {**kinds, **load_options.to_match(), **hub_options.to_match()}
        exchange.must_match = (f"arguments of {function.__name__}", arguments)
    return load_options, agree_on_source(name, hub_options, folder, exchange.gathered, world), world


def _name_of(cls: Any) -> str:
    return getattr(cls, "__name__", str(cls))


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
    resolved_ds_config, dtype, seed = _resolve_engine_settings(ds_config, options.dtype, config, world)
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
    ds_config: str | Path | Mapping[str, Any], dtype: object, config: PreTrainedConfig, world: World
) -> tuple[dict[str, Any], str, int]:
    """Return the DeepSpeed config without "auto", its engine's dtype name and rank 0's seed. Every rank; communicates.

    Raises:
        ConfigError: the config can't be used.
        DistributedError: the ranks have different DeepSpeed or model configs.
    """
    with collective_stage(world, "reading the DeepSpeed config") as exchange:
        exchange.local = torch.initial_seed()
        loaded = load_ds_config(ds_config)
        dtype_name = weights_dtype(dtype, config, loaded)
        resolved = resolve_auto(loaded, dtype_name, world.node_group_size, world.world_size)
        settings = dotted({"ds_config": settings_to_match(resolved), "config": config_settings(config)})
        exchange.must_match = ("settings of the load", settings)
    return resolved, dtype_name, exchange.gathered[0]


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
