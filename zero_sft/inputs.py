"""What the job works on, read and checked before the weights are: configs, tokenizer, data."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zero_sft import ds_config as ds_configs
from zero_sft.arguments import Parsed, build_training_arguments
from zero_sft.arguments.build import ds_config_name, require_matching_schedule
from zero_sft.arguments.ds_conflicts import count_steps
from zero_sft.data.dataset import Prepared, require_one_batch
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.packing import Packing, choose_packing, unless_too_few
from zero_sft.data.source import Source, parse_sources, require_outputs_outside, require_sources
from zero_sft.data.templates import Template, choose_template
from zero_sft.data.together import prepare_together
from zero_sft.distributed import agreed
from zero_sft.errors import ArgumentError
from zero_sft.model_check import require_usable_model
from zero_sft.saving.run_record import RunRecord, require_same_run, warn_of_other_data
from zero_sft.saving.trainer_checkpoint import TrainerCheckpoint
from zero_sft.world import World

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the job works on. `arguments`: the Trainer's; `sampling`: those of them that follow from the data."""

    arguments: Any
    config: Any
    tokenizer: Any
    template: Template
    training_data: Prepared
    evaluation_data: Prepared | None
    prompts: tuple[str, ...]
    generation: Any  # the model's generation config, which stops where the data's answers end
    hub: Mapping[str, Any]  # the loader's `**hub`, of one commit for all stages
    record: RunRecord
    checkpoint: TrainerCheckpoint | None = None  # what the run resumes from
    overwrites: bool = False  # a former run in the output folder
    sampling: Mapping[str, Any] = field(default_factory=dict)


def read_inputs(parsed: Parsed, world: World) -> Inputs:
    """Everything but the weights: DeepSpeed config, output folder, model config, tokenizer, data. Every rank; communicates."""
    from zero_sft.config import prepare_config, text_config
    from zero_sft.export_rehearsal import rehearse_export
    from zero_sft.hub import HubOptions, pin_revision
    from zero_sft.samples import read_prompts, require_answerable
    from zero_sft.saving.former_run import require_no_former_run
    from zero_sft.saving.rehearsal import rehearse_writing
    from zero_sft.saving.resume import agree_on_checkpoint
    from zero_sft.skeleton import attention_of
    from zero_sft.tokenizer import load_tokenizer

    training = parsed.training
    with agreed(world, "checking the DeepSpeed config and the output folder"):
        ds = ds_configs.load_ds_config(training["deepspeed"])
        ds["zero_optimization"].update(ds_configs.hpz_size(ds, world.node_group_size, world.world_size))
        ds_configs.require_nvme(ds)
        arguments = build_training_arguments(training, ds, parsed.given)
        prompts = tuple(read_prompts(Path(parsed.data.sample_prompts))) if parsed.data.sample_prompts else ()
        _require_other_folder(parsed.model.model_name_or_path, training["output_dir"])
    in_bf16 = arguments.hf_deepspeed_config.is_true("bf16.enabled")
    checkpoint = agree_on_checkpoint(training["resume_from_checkpoint"], training["output_dir"], world, ds, in_bf16)
    with agreed(world, "checking the output folder") as told:
        sources = parse_sources(parsed.data.training_path)
        held_out = None if parsed.data.eval_data_path is None else parse_sources(parsed.data.eval_data_path)
        if world.is_main:
            require_outputs_outside((*sources, *(held_out or ())), training["output_dir"])
            told.mine = require_no_former_run(
                training["output_dir"],
                checkpoint and checkpoint.folder,
                overwrite=training.get("overwrite_output_dir", False),
                model=parsed.model.model_name_or_path,
            )
    overwrites = told.everyone[0]
    rehearse_writing(training["output_dir"], world)
    name, length = parsed.model.model_name_or_path, training["model_max_length"]
    logger.info("reading the config of %s", name)
    hub = parsed.model.hub_options(training["cache_dir"])
    hub["revision"] = pin_revision(name, HubOptions.from_kwargs(hub), world).revision
    config = prepare_config(name, model_max_length=length, rope_parameters=parsed.model.rope_parameters, **hub)
    require_usable_model(parsed, arguments, config, hub, world)
    record = RunRecord.of(text_config(config), arguments)
    with agreed(world, "comparing the run with the checkpoint"):
        if world.is_main and checkpoint is not None:
            require_same_run(checkpoint.folder, record)
    tokenizer = load_tokenizer(name, model_max_length=length, padding_side=parsed.model.padding_side, **hub)
    attention = attention_of(config, parsed.model.attn_implementation)
    packing = choose_packing(parsed.data.packing, text_config(config), attention=attention, lazy=parsed.data.lazy_preprocess)
    with agreed(world, "choosing the chat template"):
        template = choose_template(parsed.data.chat_template, tokenizer)
    with agreed(world, "checking the prompts"):
        if world.is_main:
            require_answerable(prompts, tokenizer, template, config)
    with agreed(world, "looking for the data"):
        if world.is_main:
            require_sources(sources)
            if held_out is not None:
                require_sources(held_out, to_evaluate=True)
    rows = getattr(text_config(config), "vocab_size", None)
    generation = rehearse_export(parsed, config, tokenizer, template, HubOptions.from_kwargs(hub), world)
    train, sampling = _training_data(parsed, arguments, sources, packing, tokenizer, template, rows, world)
    for option, value in sampling.items():
        setattr(arguments, option, value)
    tokens = sum(report.tokens or 0 for report in train.reports)
    steps = count_steps(len(train.rows), arguments, world.world_size)
    record = replace(record, rows=len(train.rows), tokens=tokens, max_steps=steps)
    if world.is_main and checkpoint is not None:
        warn_of_other_data(checkpoint.folder, record)
    with agreed(world, "counting the steps"):
        require_matching_schedule(arguments, ds_config_name(training), len(train.rows), world.world_size, parsed.given)
    unused = held_out is not None and arguments.eval_strategy == "no" and not arguments.eval_on_start
    if unused and world.is_main:
        logger.warning("--eval_data_path is given, but no --eval_strategy: there will be no evaluation")
    return Inputs(
        arguments=arguments,
        config=config,
        tokenizer=tokenizer,
        template=template,
        training_data=train,
        evaluation_data=None
        if held_out is None or unused
        else _prepare("evaluation data", _spec(parsed, arguments, held_out, rows), tokenizer, template, world),
        prompts=prompts,
        generation=generation,
        hub=hub,
        checkpoint=checkpoint,
        record=record,
        overwrites=overwrites,
        sampling=sampling,
    )


def _require_other_folder(model: str, output_dir: str) -> None:
    with contextlib.suppress(OSError):  # no such folders; rank 0 may just be trying whether one can be made
        if Path(model).samefile(output_dir):
            raise ArgumentError(
                f"--output_dir {output_dir} is the model's own folder, whose weights would be replaced. Name another.",
                code="export.into_the_models_folder",
            )


def _training_data(
    parsed: Parsed,
    arguments: Any,
    sources: tuple[Source, ...],
    packing: Packing,
    tokenizer: Any,
    template: Template,
    embedding_rows: int | None,
    world: World,
) -> tuple[Prepared, dict[str, Any]]:
    """The data to train on, and how batches are drawn from it: at random from packed rows; else, unless `--packing False` was
    given, from samples of like length. Every rank; communicates.

    Raises:
        DataError: too little for one batch.
    """
    spec = _spec(parsed, arguments, sources, embedding_rows)
    size = {"world_size": world.world_size, "per_device_batch_size": arguments.per_device_train_batch_size}
    prepared = _prepare("training data", replace(spec, pack=packing.on), tokenizer, template, world)
    if prepared.is_packed:
        needed = size["world_size"] * size["per_device_batch_size"]
        packing = unless_too_few(packing, parsed.data.packing, len(prepared.rows), needed)
        if packing.on:
            require_one_batch(prepared, **size)
            logger.info("  %s", prepared.packing_note)
            return prepared, {}
    train = prepared.unpacked()
    require_one_batch(train, **size)
    logger.info("  not packed: %s", packing.reason)
    if parsed.data.packing is not None:
        return train, {}
    grouped = not spec.lazy and "train_sampling_strategy" not in parsed.training
    return train, {"train_sampling_strategy": "group_by_length"} if grouped else {}


def _spec(parsed: Parsed, arguments: Any, sources: tuple[Source, ...], embedding_rows: int | None) -> DatasetSpec:
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    spec = DatasetSpec.from_options(parsed.data, sources=sources, model_max_length=arguments.model_max_length, seed=seed)
    return replace(spec, embedding_rows=embedding_rows)


def _prepare(what: str, spec: DatasetSpec, tokenizer: Any, template: Template, world: World) -> Prepared:
    logger.info("%s: %s", what, spec.name)
    prepared = prepare_together(spec, tokenizer, template, world)
    for line in prepared.lines():
        logger.info("  %s", line)
    for warning in prepared.warnings() if world.is_main else ():
        logger.warning(warning)
    return prepared
