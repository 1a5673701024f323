"""Load the model of a run: its weights, or those of the checkpoint from which it resumes; and the adapters that it trains."""

import logging
from pathlib import Path
from typing import Any

from transformers import set_seed

from zero_sft.adapters.options import LoraOptions
from zero_sft.arguments import ParsedArguments
from zero_sft.arguments.vocabulary import with_rows
from zero_sft.checkpoint.manifest import read_manifest
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import locate_model
from zero_sft.job.inputs import Inputs
from zero_sft.job.start_checks import require_trainable
from zero_sft.job.trained_part import freeze_others
from zero_sft.library.model_methods import install_model_methods
from zero_sft.loading.load import load_model_from
from zero_sft.loading.options import LoadOptions
from zero_sft.options.keywords import pick_options
from zero_sft.rope import text_config
from zero_sft.saving.checkpoint_reader import restore_own_weights
from zero_sft.saving.forms import form_of
from zero_sft.saving.trainer_checkpoint import TrainerCheckpoint
from zero_sft.zero.shards import weight_numel

logger = logging.getLogger("zero_sft.train")


def load_for_training(parsed: ParsedArguments, inputs: Inputs, world: World) -> Any:
    """Load the model under the DeepSpeed config that `TrainingArguments` has completed. Every rank; communicates."""
    set_seed(inputs.arguments.seed)  # the load takes the seed for missing weights from torch's generator
    logger.info("loading the model")
    source = inputs.model_source
    checkpoint = inputs.checkpoint
    # A checkpoint of the whole model has the rows of added tokens.
    holds_rows = checkpoint is not None and checkpoint.sharded and not checkpoint.on_each_node and not parsed.lora.enabled
    if checkpoint is not None and holds_rows:
        options = HubOptions(trust_remote_code=source.options.trust_remote_code)
        source = locate_model(str(checkpoint.folder), options, world)
    model = load_model_from(
        source,
        world,
        ds_config=inputs.arguments.hf_deepspeed_config.config,
        config=inputs.model_spec.config if holds_rows else with_rows(inputs.model_spec.config, inputs.stored_rows),
        options=pick_options(LoadOptions, parsed.model),
    )
    install_model_methods(model, world)
    rows = getattr(text_config(inputs.model_spec.config), "vocab_size", None)
    if not holds_rows and rows != inputs.stored_rows:
        model.resize_token_embeddings(rows)
    require_trainable(model, inputs.arguments)
    if inputs.arguments.tiled_mlp:
        from zero_sft.zero.tiled_mlp import tile_mlps

        logger.info("%d MLPs compute at most %d tokens at a time", tile_mlps(model, inputs.arguments.tiled_mlp),
                    inputs.arguments.tiled_mlp)  # fmt: skip
    model.generation_config = inputs.generation_config  # the loader's, and it also stops at the template's ends of turn
    if parsed.lora.enabled:
        return _with_adapters(model, parsed.lora, inputs, world)
    if checkpoint is not None and checkpoint.on_each_node:
        _restore_from_own_files(model, checkpoint, world)
    if inputs.arguments.unfreeze is not None:
        freeze_others(model, inputs.arguments.unfreeze)
    return model


def _with_adapters(model: Any, options: LoraOptions, inputs: Inputs, world: World) -> Any:
    """Add the adapters of a new run, of an adapter to train on, or of a checkpoint. Every rank; communicates."""
    from zero_sft.adapters.attach import add_adapters, lora_config
    from zero_sft.adapters.files import load_adapter

    with collective_stage(world, "reading the adapter's config"):
        config = lora_config(options)
    config.revision = None if inputs.model_source.folder else inputs.model_source.options.revision
    adapted = add_adapters(model, config, seed=inputs.arguments.seed)
    checkpoint = inputs.checkpoint
    if checkpoint is not None and checkpoint.on_each_node:
        _restore_from_own_files(adapted, checkpoint, world)
    elif checkpoint is not None:
        load_adapter(adapted, checkpoint.folder, world)
    elif options.lora_weight_path is not None:
        load_adapter(adapted, Path(options.lora_weight_path).expanduser(), world)
    trained = sum(weight_numel(param) for param in adapted.parameters() if param.requires_grad)
    total = sum(weight_numel(param) for param in adapted.parameters())
    logger.info("LoRA: %s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    return adapted


def _restore_from_own_files(model: Any, checkpoint: TrainerCheckpoint, world: World) -> None:
    restore_own_weights(form_of(model).tensors(), checkpoint.folder, read_manifest(checkpoint.folder), world)
