"""Check, before the weights are read, what would fail later: an unusable model, unsavable settings, too small a disk.

Without these checks the job would fail after the data is prepared (an hour for a large dataset), or even after the weights are
read. Left out: the weights of a model on the hub, which the load fetches, and the class of a model with custom code, which is
unknown until that code runs.
"""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from zero_sft.arguments import ModelArguments
from zero_sft.arguments.ds_conflicts import steps_in_epoch
from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.checkpoint.index import read_index
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.packing import is_flash
from zero_sft.data.templates.choose import Template
from zero_sft.errors import ArgumentError, ConfigError
from zero_sft.generation_config import eos_token_ids, inconsistent_settings, read_generation_config, stop_at, turn_ends
from zero_sft.hub.source import CONFIG, ModelSource, fetch_files
from zero_sft.job.sequence_parallel import require_shareable
from zero_sft.loading.dtype import weights_dtype
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import attention_of, require_attention, resolve_class
from zero_sft.saving.checkpoint_folders import folder_bytes
from zero_sft.saving.room import SaveSizes, checkpoint_bytes, checkpoints_at_once, export_sizes, require_room
from zero_sft.saving.settings import rehearse_settings
from zero_sft.storage import torch_zip

if TYPE_CHECKING:
    from zero_sft.job.inputs import Inputs

logger = logging.getLogger("zero_sft.train")

_FROM_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of `zero_optimization` whose "auto" the Trainer computes from the model's hidden size."""


def check_model(options: ModelArguments, arguments: Any, config: Any, source: ModelSource, world: World) -> ModelSpec:
    """Check the model's class, attention, dtype and files against these arguments. Every rank; communicates.

    Returns:
        The model before its weights are read. Its folder is the name if the model is on the hub, since nothing is fetched yet.
        The load makes its spec from the same config and arguments, with the folder that it has fetched.

    Raises:
        ZeroSftError: the same on every rank; the model can't be trained with these arguments.
    """
    with collective_stage(world, "checking the model"):
        dtype = weights_dtype(options.dtype, config, arguments.hf_deepspeed_config.config)
        attention = attention_of(config, options.attn_implementation)
        if is_flash(attention) and dtype == "float32":
            raise ArgumentError(
                f"the attention implementation {attention} works only in 16 bits, but this run trains in float32. "
                "Give --bf16 True, or --attn_implementation sdpa.",
                code="arguments.attention_needs_16_bits",
            )
        if not getattr(config, "auto_map", None):
            cls, part = resolve_class(config, None, source.folder or source.name, trust_remote_code=False)
            require_activation_checkpointing(cls, arguments)
            require_shareable(part, cls, attention, arguments.sequence_parallel_size, world.world_size)
            if attention:
                require_attention(cls, part, attention)
        _require_hidden_size(arguments.hf_deepspeed_config, config)
        if source.folder is not None and world.is_main:
            # Every weight file's header: a missing, truncated or placeholder file is an error.
            read_index(source.folder, torch_zip.read_bin_header, source.options.variant)
    return ModelSpec(
        folder=source.folder or Path(source.name),
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=options.trust_remote_code,
    )


def require_activation_checkpointing(cls: Any, arguments: Any) -> None:
    """Raise if a model's class can't do the activation checkpointing that the arguments ask for. Any rank.

    Raises:
        ArgumentError: with the option that turns it off.
    """
    if arguments.activation_checkpointing and not cls.supports_gradient_checkpointing:
        raise ArgumentError(
            f"{cls.__name__} does not support --activation_checkpointing, which is on by default: "
            "give --activation_checkpointing False.",
            code="arguments.no_activation_checkpointing",
        )


def require_trainable(model: Any, arguments: Any) -> None:
    """Check a loaded model for what custom code may lack. Any rank.

    Raises:
        ArgumentError: it has no activation checkpointing, though the arguments ask for it.
        ConfigError: it does not name its output embeddings, from which TRL computes the loss.
    """
    require_activation_checkpointing(type(model), arguments)
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} does not name its output embeddings, from which the loss is computed. Call the "
            "module lm_head, or add get_output_embeddings to the model's code.",
            code="config.no_output_embeddings",
        )


def _require_hidden_size(hf_config: Any, config: Any) -> None:
    """Check the Trainer's condition for three "auto" values, which it applies only when the engine starts."""
    auto_keys = [key for key in _FROM_HIDDEN_SIZE if hf_config.is_auto(f"zero_optimization.{key}")]
    configs = [config, getattr(config, "text_config", None)]
    if auto_keys and not any(hasattr(part, name) for part in configs for name in ("hidden_size", "hidden_sizes")):
        raise ConfigError(
            f'zero_optimization has "auto" for {", ".join(auto_keys)}, which the Trainer computes from the model\'s '
            f"hidden_size; {type(config).__name__} has none. Set numbers: about h², 0.9 h² and 10 h for a model of width h.",
            code="ds_config.auto_needs_hidden_size",
        )


def prepare_export_settings(
    config: Any, tokenizer: Any, template: Template, source: ModelSource, world: World
) -> tuple[GenerationConfig, Any]:
    """Build the generation config and the tokenizer of the export, and rehearse saving them. Every rank; communicates.

    Raises:
        ExportError, ConfigError: a setting that the export needs can't be read or saved.
    """
    folder = fetch_files(source, world, CONFIG)
    with collective_stage(world, "rehearsing the export's settings"):
        generation_config, _ = read_generation_config(folder)  # the loader warns about settings that are refused
        ends, stored_ids = turn_ends(tokenizer, template.turn_ends), eos_token_ids(generation_config)
        added_ids = stop_at(generation_config, ends)
        saved_tokenizer = copy.deepcopy(tokenizer)
        saved_tokenizer.chat_template = template.jinja(tokenizer)
        if world.is_main:
            rehearse_settings(config, generation_config, saved_tokenizer)
    if world.is_main:
        if names := inconsistent_settings(generation_config):
            logger.warning(
                "generation_config.json of %s sets %s, which transformers considers inconsistent; they are saved unchanged",
                source.name,
                ", ".join(names),
            )
        if added_ids:
            stored = ", ".join(map(str, tokenizer.convert_ids_to_tokens(stored_ids)))
            logger.info(
                "answers end with %s: the exported generation_config.json stops there%s",
                ", ".join(tokenizer.convert_ids_to_tokens(added_ids)),
                f" as well as at {stored}" if stored_ids else "",
            )
        if ends.texts:
            logger.warning(
                "answers end with the text %s, which is not one token, so generation_config.json can't hold it: pass "
                "stop_strings=%r and tokenizer=tokenizer to generate",
                " or ".join(map(repr, ends.texts)),
                list(ends.texts),
            )
    return generation_config, saved_tokenizer


def require_room_for_run(inputs: "Inputs", world: World) -> None:
    """Check the room for the export and for the checkpoints that the arguments ask for. Every rank; communicates.

    Where each node has its own output folder, each needs room for its ranks' part.

    Raises:
        ExportError: the file system of `--output_dir` has too little room.
    """
    with collective_stage(world, "checking the room in the output folder"):
        if not world.leads_folder(on_each_node=inputs.arguments.save_on_each_node):
            return
        try:
            sizes = _save_sizes(inputs, world)
        except Exception as error:  # noqa: BLE001 - a model that can't be built: the load reports it in detail
            logger.debug("the size of the export can't be computed: %r", error)
            return
        output = Path(inputs.arguments.output_dir)
        freed = sum(map(folder_bytes, checkpoints_in(output))) if inputs.overwrites_run else 0
        require_room(output, sizes, freed)


def _checkpoint_bytes(inputs: "Inputs", saved_bytes: int, numel: int) -> int:
    """Return the least bytes of a checkpoint.

    Args:
        saved_bytes: of the weights in it.
        numel: elements that are trained.
    """
    arguments = inputs.arguments
    if arguments.save_only_model:
        return saved_bytes
    states = checkpoint_bytes(numel, inputs.record.optimizer)
    if arguments.checkpoint_format == "deepspeed":
        return states
    config = arguments.hf_deepspeed_config
    has_master_weights = config.is_true("bf16.enabled") or config.is_true("fp16.enabled")
    return saved_bytes + (states if has_master_weights else states - 4 * numel)


def _save_sizes(inputs: "Inputs", world: World) -> SaveSizes:
    arguments, record = inputs.arguments, inputs.record
    export_bytes, numel = export_sizes(inputs.model_spec)
    saved_bytes = export_bytes  # of the weights in a checkpoint
    if inputs.adapter is not None:
        saved_bytes, numel = inputs.adapter.nbytes, inputs.adapter.numel
        export_bytes = saved_bytes + (export_bytes if inputs.adapter.merge else 0)
    epochs = record.max_steps / steps_in_epoch(record.rows, arguments, arguments.data_ranks)
    first_step = inputs.checkpoint.global_step if inputs.checkpoint else 0
    bytes_of_checkpoint = _checkpoint_bytes(inputs, saved_bytes, numel)
    if arguments.save_on_each_node and not arguments.save_only_model:
        bytes_of_checkpoint = bytes_of_checkpoint * world.local_world_size // world.world_size
    return SaveSizes(
        export_bytes=export_bytes if world.is_main else 0,
        checkpoint_bytes=bytes_of_checkpoint,
        checkpoints=checkpoints_at_once(
            arguments.save_strategy.value, record.max_steps, arguments.save_steps, epochs, arguments.save_total_limit,
            first_step,
        ),
    )  # fmt: skip
