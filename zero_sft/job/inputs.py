"""Read and check all inputs of the job except the weights: configs, tokenizer, chat template and data."""

import contextlib
import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zero_sft import ds_config as ds_configs
from zero_sft.arguments import DataArguments, ParsedArguments, build_training_arguments
from zero_sft.arguments.build import ds_config_name, require_matching_schedule
from zero_sft.arguments.ds_conflicts import count_steps
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.dataset import PreparedDataset, require_one_batch
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.packing import PackingDecision, packing_unless_too_few, resolve_packing
from zero_sft.data.prepare_distributed import prepare_distributed
from zero_sft.data.sources.data_path import Source, parse_sources, require_outputs_outside, require_sources
from zero_sft.data.templates.choose import Template, choose_template
from zero_sft.errors import ArgumentError
from zero_sft.hub.source import ModelSource
from zero_sft.job.model_check import require_usable_model
from zero_sft.saving.run_record import RunRecord, require_same_run, warn_of_other_data
from zero_sft.saving.trainer_checkpoint import TrainerCheckpoint

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The checked inputs of the job."""

    arguments: Any  # TrainingArguments
    config: Any
    tokenizer: Any
    template: Template
    training_data: PreparedDataset
    evaluation_data: PreparedDataset | None
    prompts: tuple[str, ...]
    generation: Any  # the generation config of the export, which stops at the template's ends of turn
    source: ModelSource
    record: RunRecord
    checkpoint: TrainerCheckpoint | None = None  # the run resumes from it
    overwrites_run: bool = False  # whether to overwrite a previous run in the output folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """The data sources for training and for evaluation; None: no evaluation data."""

    training: tuple[Source, ...]
    evaluation: tuple[Source, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preparation:
    """The settings with which this run turns its training and evaluation sources into rows."""

    options: DataArguments
    arguments: Any
    tokenizer: Any
    template: Template
    embedding_rows: int | None

    def prepare(self, title: str, sources: tuple[Source, ...], world: World, *, pack: bool = False) -> PreparedDataset:
        """Prepare the data of `sources`, and log its report under `title`. Every rank; communicates."""
        arguments = self.arguments
        spec = DatasetSpec.from_options(
            self.options,
            sources=sources,
            model_max_length=arguments.model_max_length,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        )
        spec = replace(spec, pack=pack, embedding_rows=self.embedding_rows)
        logger.info("%s: %s", title, spec.name)
        prepared = prepare_distributed(spec, self.tokenizer, self.template, world)
        for line in prepared.lines():
            logger.info("  %s", line)
        for warning in prepared.warnings() if world.is_main else ():
            logger.warning(warning)
        return prepared


def read_inputs(parsed: ParsedArguments, world: World) -> Inputs:
    """Read and check everything but the weights, from the DeepSpeed config to the data. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    from zero_sft.config import prepare_config_from, text_config
    from zero_sft.hub.options import HubOptions
    from zero_sft.hub.source import locate_model
    from zero_sft.job.export_check import check_export_settings
    from zero_sft.job.generation import read_prompts
    from zero_sft.loading.skeleton import attention_of
    from zero_sft.options.keywords import pick_options
    from zero_sft.saving.resume import agree_on_checkpoint
    from zero_sft.saving.write_check import check_writing
    from zero_sft.tokenizer import load_tokenizer_from

    training = parsed.training
    with collective_stage(world, "checking the DeepSpeed config and the output folder"):
        ds = ds_configs.load_ds_config(training["deepspeed"])
        ds["zero_optimization"].update(ds_configs.hpz_size(ds, world.node_group_size, world.world_size))
        ds_configs.require_nvme(ds)
        arguments = build_training_arguments(training, ds, parsed.given_names)
        prompts = tuple(read_prompts(Path(parsed.data.sample_prompts))) if parsed.data.sample_prompts else ()
        _require_other_folder(parsed.model.model_name_or_path, training["output_dir"])
    in_bf16 = arguments.hf_deepspeed_config.is_true("bf16.enabled")
    checkpoint = agree_on_checkpoint(training["resume_from_checkpoint"], training["output_dir"], world, ds, in_bf16)
    sources, overwrites = _check_output_folder(parsed, checkpoint, world)
    check_writing(training["output_dir"], world)
    name, length = parsed.model.model_name_or_path, training["model_max_length"]
    logger.info("reading the config of %s", name)
    source = locate_model(name, pick_options(HubOptions, parsed.model), world)
    config = prepare_config_from(source, world, model_max_length=length, rope_parameters=parsed.model.rope_parameters)
    require_usable_model(parsed, arguments, config, source, world)
    record = RunRecord.of(text_config(config), arguments)
    with collective_stage(world, "comparing the run with the checkpoint"):
        if world.is_main and checkpoint is not None:
            require_same_run(checkpoint.folder, record)
    tokenizer = load_tokenizer_from(source, world, model_max_length=length, padding_side=parsed.model.padding_side)
    attention = attention_of(config, parsed.model.attn_implementation)
    packing = resolve_packing(parsed.data.packing, text_config(config), attention=attention, lazy=parsed.data.lazy_preprocess)
    template = _choose_template(parsed.data.chat_template, tokenizer, prompts, config, world)
    _require_data(sources, world)
    generation = check_export_settings(parsed, config, tokenizer, template, source, world)
    preparation = _Preparation(
        options=parsed.data,
        arguments=arguments,
        tokenizer=tokenizer,
        template=template,
        embedding_rows=getattr(text_config(config), "vocab_size", None),
    )
    train, sampling = _training_data(preparation, sources.training, packing, parsed.given_names, world)
    for option, value in sampling.items():
        setattr(arguments, option, value)
    record = _count_steps(record, train, parsed, arguments, checkpoint, world)
    evaluation = _evaluation_data(preparation, sources.evaluation, world)
    return Inputs(
        arguments=arguments,
        config=config,
        tokenizer=tokenizer,
        template=template,
        training_data=train,
        evaluation_data=evaluation,
        prompts=prompts,
        generation=generation,
        source=source,
        checkpoint=checkpoint,
        record=record,
        overwrites_run=overwrites,
    )


def _require_other_folder(model: str, output_dir: str) -> None:
    with contextlib.suppress(OSError):  # a folder does not exist, or rank 0 is just creating it as a trial
        if Path(model).samefile(output_dir):
            raise ArgumentError(
                f"--output_dir {output_dir} is the folder of the model, whose weights would be replaced. Name another folder.",
                code="export.into_the_models_folder",
            )


def _check_output_folder(parsed: ParsedArguments, checkpoint: TrainerCheckpoint | None, world: World) -> tuple[_Sources, bool]:
    """Parse the data sources, and return whether the output folder holds a previous run that is to be overwritten.

    Every rank; communicates.

    Raises:
        DataError: a path names no source, or the output folder lies inside the data.
        ArgumentError: the folder holds a previous run that must not be overwritten.
    """
    from zero_sft.saving.former_run import require_no_former_run

    training, eval_path = parsed.training, parsed.data.eval_data_path
    with collective_stage(world, "checking the output folder") as exchange:
        sources = _Sources(
            training=parse_sources(parsed.data.training_path),
            evaluation=None if eval_path is None else parse_sources(eval_path),
        )
        if world.is_main:
            require_outputs_outside((*sources.training, *(sources.evaluation or ())), training["output_dir"])
            exchange.local = require_no_former_run(
                training["output_dir"],
                checkpoint and checkpoint.folder,
                overwrite=training.get("overwrite_output_dir", False),
                model=parsed.model.model_name_or_path,
            )
    return sources, exchange.gathered[0]


def _choose_template(name: str | None, tokenizer: Any, prompts: Sequence[str], config: Any, world: World) -> Template:
    """Choose the run's chat template, and check that all prompts can be answered with it. Every rank; communicates.

    Raises:
        DataError: the template can't be used, or a prompt can't be answered.
    """
    from zero_sft.job.generation import require_answerable

    with collective_stage(world, "choosing the chat template"):
        template = choose_template(name, tokenizer)
    with collective_stage(world, "checking the prompts"):
        if world.is_main:
            require_answerable(prompts, tokenizer, template, config)
    return template


def _require_data(sources: _Sources, world: World) -> None:
    """Raise `DataError` if a source does not exist. Every rank; communicates."""
    with collective_stage(world, "looking for the data"):
        if world.is_main:
            require_sources(sources.training)
            if sources.evaluation is not None:
                require_sources(sources.evaluation, to_evaluate=True)


def _training_data(
    preparation: _Preparation, sources: tuple[Source, ...], packing: PackingDecision, given_options: Set[str], world: World
) -> tuple[PreparedDataset, dict[str, Any]]:
    """Prepare the training data, and choose the sampling strategy. Every rank; communicates.

    Packed rows are drawn at random. Unpacked samples are grouped by length, unless `--packing` or a strategy was given.

    Raises:
        DataError: the data does not fill one batch.
    """
    options, batch_size = preparation.options, preparation.arguments.per_device_train_batch_size
    sizes = {"world_size": world.world_size, "per_device_batch_size": batch_size}
    prepared = preparation.prepare("training data", sources, world, pack=packing.enabled)
    if prepared.is_packed:
        packing = packing_unless_too_few(packing, options.packing, len(prepared.rows), world.world_size * batch_size)
        if packing.enabled:
            require_one_batch(prepared, **sizes)
            logger.info("  %s", prepared.packing_note)
            return prepared, {}
    train = prepared.unpacked()
    require_one_batch(train, **sizes)
    logger.info("  not packed: %s", packing.reason)
    if options.packing is not None:
        return train, {}
    grouped = not options.lazy_preprocess and "train_sampling_strategy" not in given_options
    return train, {"train_sampling_strategy": "group_by_length"} if grouped else {}


def _evaluation_data(preparation: _Preparation, sources: tuple[Source, ...] | None, world: World) -> PreparedDataset | None:
    """Prepare the evaluation data; None without such data or without an evaluation. Every rank; communicates."""
    if sources is None:
        return None
    arguments = preparation.arguments
    if arguments.eval_strategy == "no" and not arguments.eval_on_start:
        if world.is_main:
            logger.warning("--eval_data_path has no effect without --eval_strategy: the run does not evaluate")
        return None
    return preparation.prepare("evaluation data", sources, world)


def _count_steps(
    record: RunRecord,
    train: PreparedDataset,
    parsed: ParsedArguments,
    arguments: Any,
    checkpoint: TrainerCheckpoint | None,
    world: World,
) -> RunRecord:
    """Add the size of the data and the number of steps to the record. Every rank; communicates.

    Raises:
        ConfigError: the scheduler of the DeepSpeed config has a different number of steps.
    """
    rows, tokens = len(train.rows), sum(report.tokens or 0 for report in train.reports)
    record = replace(record, rows=rows, tokens=tokens, max_steps=count_steps(rows, arguments, world.world_size))
    if world.is_main and checkpoint is not None:
        warn_of_other_data(checkpoint.folder, record)
    with collective_stage(world, "counting the steps"):
        require_matching_schedule(arguments, ds_config_name(parsed.training), rows, world.world_size, parsed.given_names)
    return record
