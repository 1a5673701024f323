"""Load a model, or a model and its tokenizer, sharded from the first byte.

The steps of `load_model`, in order: folder → class and dtype → skeleton → index → names → plan → arena → reads → ties, buffers
and missing weights → report. Every rank runs all of them. Each stage that can fail ends in an agreement, so that all ranks
go on or all raise the same error.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zero_sft import distributed, transformers_internals
from zero_sft import ds_config as ds_configs
from zero_sft.config import prepare_config
from zero_sft.distributed import agreed
from zero_sft.errors import ArgumentError
from zero_sft.hub.source import FLAG, HubOptions, pin_revision, require_kind, resolve_weights
from zero_sft.loading.report import LoadReport
from zero_sft.loading.request import Checks, Request
from zero_sft.loading.sharded import BUFFER_MIB_A_THREAD, load_sharded
from zero_sft.loading.stock import load_stock
from zero_sft.storage.memory import Watermark
from zero_sft.world import World
from zero_sft.zero import internals

logger = logging.getLogger(__name__)

LOADERS = ("sharded", "stock")


def load_pretrained(
    model_name_or_path: str,
    *,
    ds_config: str | Path | Mapping[str, Any],
    model_max_length: int = 512,
    rope_parameters: dict | None = None,
    dtype: str | torch.dtype = "auto",
    model_class: Any = None,
    attn_implementation: str | None = None,
    padding_side: str = "right",
    loader: str = "sharded",
    strict: bool = False,
    verify: bool = False,
    ignore_mismatched_sizes: bool = False,
    buffer_mib: int = 64,
    mmap: bool = True,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Config, model and tokenizer, as FastChat's training has them, under ZeRO-3. Every rank; communicates.

    What `prepare_config`, `load_model` and `load_tokenizer` give; their arguments and errors apply. Rank 0 sets the tokenizer
    up while the weights are read.
    """
    from zero_sft.tokenizer import Wanted, share  # a model alone needs no tokenizer libraries

    world = distributed.connect(World.detect())
    options = pin_revision(model_name_or_path, HubOptions.from_kwargs(hub, load_pretrained), world)
    hub["revision"] = options.revision
    config = prepare_config(model_name_or_path, model_max_length=model_max_length, rope_parameters=rope_parameters, **hub)
    wanted = Wanted(name=model_name_or_path, options=options, model_max_length=model_max_length, padding_side=padding_side)
    begun: list[Future] = []
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as beside:
        model = load_model(
            model_name_or_path,
            ds_config=ds_config,
            config=config,
            dtype=dtype,
            model_class=model_class,
            attn_implementation=attn_implementation,
            loader=loader,
            strict=strict,
            verify=verify,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            buffer_mib=buffer_mib,
            mmap=mmap,
            while_reading=lambda: begun.append(beside.submit(wanted.prepare)) if world.is_main else None,
            **hub,
        )
        tokenizer = share(world, wanted, begun[0].result if begun else wanted.prepare)
    return model, tokenizer


def load_model(
    model_name_or_path: str,
    *,
    ds_config: str | Path | Mapping[str, Any],
    config: PreTrainedConfig | None = None,
    dtype: str | torch.dtype = "auto",
    model_class: Any = None,
    attn_implementation: str | None = None,
    loader: str = "sharded",
    strict: bool = False,
    verify: bool = False,
    ignore_mismatched_sizes: bool = False,
    buffer_mib: int = 64,
    mmap: bool = True,
    while_reading: Callable[[], object] | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """Load a model partitioned by ZeRO-3, every rank reading its own bytes. Every rank; communicates (no weights).

    Args:
        model_name_or_path: a local folder, or a hub id, which is downloaded once per file system.
        ds_config: a DeepSpeed config of stage 3: a dict, the path of a JSON file, or a shipped name. "auto" is fine.
        config: the model's config as `prepare_config` made it; None reads the folder's own.
        dtype: "auto", a torch dtype or its name. It decides where the DeepSpeed config says "auto"; else the engine does.
        model_class: a model class or an Auto class; None is `AutoModelForCausalLM`.
        attn_implementation: as in transformers ("sdpa", "eager", "flash_attention_2", ...).
        loader: "sharded", or "stock" for transformers' own way, which knows none of the following three.
        strict: a missing or unexpected name is an error.
        verify: read back: every shard is hashed against the files, along another path than the load's.
        ignore_mismatched_sizes: tensors of another shape than the model's are initialised anew instead of an error.
        buffer_mib: what the load may hold beside its shards, in MiB, at least 16: each 16 are one reading thread, as far as
            there are cores. Leaves out the module that is initialised, and what is computed once a node.
        mmap: a shard that stays in ordinary host memory, and is one run of a file in the page cache, is mapped from there, not
            copied. Until an engine starts, whoever overwrites that file in place changes the model; the engine's start
            copies, and refuses if somebody did. False: all is copied at once.
        while_reading: called when the sharded loader begins to read, on every rank, to start other work on a thread: nothing
            else happens on the host until the weights are there. It must not communicate.
        **hub: `trust_remote_code, cache_dir, revision, token, local_files_only, subfolder, variant`.

    Returns:
        An ordinary `PreTrainedModel` in evaluation mode, ready for `forward`, `generate`, `deepspeed.initialize` and
        `Trainer`; `model.load_report` is the account of the load.

    Raises:
        ZeroSftError: the same one on every rank; its class says what was wrong.
    """
    if loader not in LOADERS:
        raise ArgumentError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}", code="arguments.wrong_value")
    if type(buffer_mib) is not int or buffer_mib < BUFFER_MIB_A_THREAD:
        raise ArgumentError(
            f"buffer_mib must be a whole number, at least {BUFFER_MIB_A_THREAD}; got {buffer_mib!r}",
            code="arguments.wrong_value",
        )
    _require_flags(strict=strict, verify=verify, ignore_mismatched_sizes=ignore_mismatched_sizes, mmap=mmap)
    options = HubOptions.from_kwargs(hub, load_model)
    world = distributed.connect(World.detect())
    sent_before = distributed.bytes_communicated()
    folder = resolve_weights(model_name_or_path, options, world)
    if config is None:
        config = prepare_config(model_name_or_path, **hub)
    ds, name, seed = _engine(ds_config, dtype, config, world)
    _warn_if_untested(world)
    report = LoadReport(loader=loader, model=model_name_or_path, dtype=name, rank=world.rank, world_size=world.world_size)
    request = Request(
        folder=folder,
        config=config,
        ds_config=ds,
        dtype=getattr(torch, name),
        seed=seed,
        model_class=model_class,
        attn_implementation=attn_implementation,
        trust_remote_code=options.trust_remote_code,
        variant=options.variant,
        buffer_mib=buffer_mib,
        mmap=mmap,
        while_reading=while_reading,
        checks=Checks(strict=strict, verify=verify, ignore_mismatched_sizes=ignore_mismatched_sizes),
    )
    start = Watermark.now()
    model = (load_stock if loader == "stock" else load_sharded)(request, world, report)
    model.name_or_path = model.config.name_or_path = model_name_or_path
    report.bytes_communicated = distributed.bytes_communicated() - sent_before
    _hand_over(model, report, start, world)
    return model


def _require_flags(**flags: object) -> None:
    for name, value in flags.items():
        require_kind(name, value, FLAG)


def _engine(
    ds_config: str | Path | Mapping[str, Any], dtype: str | torch.dtype, config: PreTrainedConfig, world: World
) -> tuple[dict[str, Any], str, int]:
    """The DeepSpeed config without "auto", the name of its engine's dtype, and rank 0's random seed. Every rank."""
    with agreed(world, "reading the DeepSpeed config") as told:
        told.mine = torch.initial_seed()
        ds = ds_configs.load_ds_config(ds_config)
        wanted = wanted_dtype(dtype, config)
        name = ds_configs.engine_dtype(ds, wanted)
        require_engine_dtype(dtype, wanted, name)
        ds = ds_configs.concrete(ds, name, world.node_group_size, world.world_size)
    return ds, name, told.everyone[0]


def _hand_over(model: PreTrainedModel, report: LoadReport, start: Watermark, world: World) -> None:
    """Complete the report, attach it to the model, and say it on rank 0. Every rank; communicates."""
    report.peak_host_bytes, report.peak_device_bytes = Watermark.now().growth_since(start)
    report.gather(distributed.exchange(world, report.numbers()))
    setattr(model, "load_report", report)  # noqa: B010 - an attribute that nn.Module's stub does not know
    if world.is_main:
        logger.info(report.summary())


def wanted_dtype(dtype: str | torch.dtype, config: PreTrainedConfig) -> str:
    """The name of the dtype that was asked for; "auto" is the config's own, as in `from_pretrained`."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"dtype must be 'auto', a torch dtype or its name, got {dtype!r}", code="arguments.wrong_value")
    return str(found).removeprefix("torch.")  # torch.half is another name of torch.float16


def require_engine_dtype(dtype: str | torch.dtype, asked: str, engine: str) -> None:
    """Raise `ArgumentError` if a dtype was asked for (not "auto") that is not the engine's."""
    if dtype != "auto" and asked != engine:
        raise ArgumentError(
            f"dtype {asked} was asked for, but this DeepSpeed config trains parameters in {engine}. Set bf16.enabled or "
            'fp16.enabled in it to match (or to "auto"), or leave dtype at "auto".',
            code="arguments.dtype_contradicts_engine",
        )


def _warn_if_untested(world: World) -> None:
    for warning in (internals.untested(), transformers_internals.untested()):
        if warning and world.is_main:
            logger.warning(warning)
