"""Public functions that load a model, or a model and its tokenizer, directly into ZeRO-3 shards.

They check and compare their arguments, and locate the model; `loading.load` loads it. The model gets methods that know of its
shards.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.config import prepare_config_from
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import ModelSource, agree_on_source, local_folder, require_name
from zero_sft.library.model_methods import install_model_methods
from zero_sft.loading.load import load_model_from
from zero_sft.loading.options import LoadOptions, without_removed_options
from zero_sft.options.keywords import read_keywords, require_instance, takes_options, wrong_value
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.zero.process_group import connect


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
    install_model_methods(model, world)
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
        load_in_4bit: store the weights of linear modules in 4 bits, quantised by bitsandbytes while they are read. They are
            frozen: train adapters. `bnb_4bit_quant_type` ("nf4" or "fp4") and `bnb_4bit_use_double_quant` are its settings.
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
    model = load_model_from(
        source,
        world,
        ds_config=ds_config,
        config=config,
        options=load_options,
        model_class=model_class,
        while_reading=while_reading,
    )
    install_model_methods(model, world)
    return model


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
