"""Read and check all inputs of the job except the weights: configs, tokenizer, chat template and data."""

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zero_sft import ds_config as ds_configs
from zero_sft.arguments import ParsedArguments, build_training_arguments
from zero_sft.arguments.build import ds_config_name, require_matching_schedule
from zero_sft.arguments.ds_conflicts import count_steps
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.config import prepare_config_from
from zero_sft.data.dataset import PreparedDataset, require_one_batch
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.packing import packing_unless_too_few, resolve_packing
from zero_sft.data.prepare_distributed import prepare_distributed
from zero_sft.data.sources.data_path import Source, parse_sources, require_outputs_outside, require_sources
from zero_sft.data.templates.choose import Template, choose_template
from zero_sft.errors import ArgumentError
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import ModelSource, locate_model
from zero_sft.job.generation import read_prompts, require_answerable
from zero_sft.job.start_checks import build_model_spec, prepare_export_settings
from zero_sft.loading.request import ModelSpec
from zero_sft.options.keywords import pick_options
from zero_sft.rope import text_config
from zero_sft.saving.folder import require_writable_everywhere
from zero_sft.saving.former_run import LOGS, require_no_former_run
from zero_sft.saving.resume import agree_on_checkpoint
from zero_sft.saving.run_record import RunRecord, require_same_run, warn_of_other_data
from zero_sft.saving.trainer_checkpoint import TrainerCheckpoint
from zero_sft.tokenizer import load_tokenizer_from

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The checked inputs of the job.

    Attributes:
        arguments: the `TrainingArguments`.
        model_spec: the model, before its weights are read.
        saved_tokenizer: the tokenizer that checkpoints and the export hold, with the chat template of the run.
        generation_config: the export's, which stops at the template's ends of turn.
        record: describes the run in its checkpoints.
        checkpoint: the run resumes from it.
        overwrites_run: whether to overwrite a previous run in the output folder.
    """

    arguments: Any
    source: ModelSource
    model_spec: ModelSpec
    tokenizer: Any
    saved_tokenizer: Any
    template: Template
    training_data: PreparedDataset
    evaluation_data: PreparedDataset | None
    prompts: tuple[str, ...]
    generation_config: Any
    record: RunRecord
    checkpoint: TrainerCheckpoint | None
    overwrites_run: bool

    @property
    def log_folder(self) -> Path:
        """The folder for the run's logs and metrics."""
        return Path(self.arguments.output_dir) / LOGS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """The data sources for training and for evaluation; None: no evaluation data."""

    training: tuple[Source, ...]
    evaluation: tuple[Source, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preparation:
    """The settings with which this run turns its training and evaluation sources into rows."""

    parsed: ParsedArguments
    arguments: Any
    tokenizer: Any
    template: Template
    model_spec: ModelSpec

    def prepare(self, title: str, sources: tuple[Source, ...], world: World, *, pack: bool = False) -> PreparedDataset:
        """Prepare the data of `sources`, and log its report under `title`. Every rank; communicates."""
        dataset_spec = DatasetSpec.from_options(
            self.parsed.data,
            self.arguments,
            sources=sources,
            pack=pack,
            embedding_rows=getattr(text_config(self.model_spec.config), "vocab_size", None),
        )
        logger.info("%s: %s", title, dataset_spec.name)
        prepared = prepare_distributed(dataset_spec, self.tokenizer, self.template, world)
        for line in prepared.lines():
            logger.info("  %s", line)
        for warning in prepared.warnings():
            if world.is_main:
                logger.warning(warning)
        return prepared


def read_inputs(parsed: ParsedArguments, world: World) -> Inputs:
    """Read and check everything but the weights, from the DeepSpeed config to the data. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    arguments, prompts, sources = _build_arguments(parsed, world)
    checkpoint, overwrites_run = _check_data_and_output(parsed, arguments, sources, world)
    source, model_spec, record = _read_config(parsed, arguments, checkpoint, world)
    length = arguments.model_max_length
    tokenizer = load_tokenizer_from(source, world, model_max_length=length, padding_side=parsed.model.padding_side)
    with collective_stage(world, "choosing the chat template"):
        template = choose_template(parsed.data.chat_template, tokenizer)
        if world.is_main:
            require_answerable(prompts, tokenizer, template, model_spec.config)
    generation_config, saved_tokenizer = prepare_export_settings(model_spec.config, tokenizer, template, source, world)
    preparation = _Preparation(
        parsed=parsed, arguments=arguments, tokenizer=tokenizer, template=template, model_spec=model_spec
    )
    training_data = _training_data(preparation, sources.training, world)
    if _groups_by_length(parsed, training_data):
        arguments.train_sampling_strategy = "group_by_length"
    record = _with_size(record, training_data, preparation, checkpoint, world)
    evaluation_data = _evaluation_data(preparation, sources.evaluation, world)
    return Inputs(
        arguments=arguments,
        source=source,
        model_spec=model_spec,
        tokenizer=tokenizer,
        saved_tokenizer=saved_tokenizer,
        template=template,
        training_data=training_data,
        evaluation_data=evaluation_data,
        prompts=prompts,
        generation_config=generation_config,
        record=record,
        checkpoint=checkpoint,
        overwrites_run=overwrites_run,
    )


def _build_arguments(parsed: ParsedArguments, world: World) -> tuple[Any, tuple[str, ...], _Sources]:
    """Build the Trainer's arguments, read the prompts, and parse the data sources. Every rank; communicates."""
    training, data = parsed.training, parsed.data
    with collective_stage(world, "checking the DeepSpeed config and the arguments"):
        ds = ds_configs.load_ds_config(training["deepspeed"])
        ds["zero_optimization"].update(ds_configs.hpz_size(ds, world.node_group_size, world.world_size))
        ds_configs.require_nvme(ds)
        arguments = build_training_arguments(training, ds, parsed.given_names)
        prompts = tuple(read_prompts(Path(data.sample_prompts))) if data.sample_prompts else ()
        _require_other_folder(parsed.model.model_name_or_path, training["output_dir"])
        sources = _Sources(
            training=parse_sources(data.training_path),
            evaluation=None if data.eval_data_path is None else parse_sources(data.eval_data_path),
        )
    return arguments, prompts, sources


def _require_other_folder(model: str, output_dir: str) -> None:
    with contextlib.suppress(OSError):  # a folder does not exist, or rank 0 is just creating it as a trial
        if Path(model).samefile(output_dir):
            raise ArgumentError(
                f"--output_dir {output_dir} is the folder of the model, whose weights would be replaced. Name another folder.",
                code="export.into_the_models_folder",
            )


def _check_data_and_output(
    parsed: ParsedArguments, arguments: Any, sources: _Sources, world: World
) -> tuple[TrainerCheckpoint | None, bool]:
    """Return the checkpoint that the run resumes from, and whether it overwrites a previous run. Every rank; communicates."""
    training, ds = parsed.training, arguments.hf_deepspeed_config
    output_dir = training["output_dir"]
    checkpoint = agree_on_checkpoint(
        training["resume_from_checkpoint"], output_dir, world, ds.config, bf16=ds.is_true("bf16.enabled")
    )
    with collective_stage(world, "checking the data and the output folder") as exchange:
        if world.is_main:
            require_outputs_outside((*sources.training, *(sources.evaluation or ())), output_dir)
            require_sources(sources.training)
            require_sources(sources.evaluation or (), to_evaluate=True)
            exchange.local = require_no_former_run(
                output_dir,
                checkpoint and checkpoint.folder,
                overwrite=training["overwrite_output_dir"],
                model=parsed.model.model_name_or_path,
            )
    require_writable_everywhere(output_dir, world)
    return checkpoint, exchange.gathered[0]


def _read_config(
    parsed: ParsedArguments, arguments: Any, checkpoint: TrainerCheckpoint | None, world: World
) -> tuple[ModelSource, ModelSpec, RunRecord]:
    """Locate the model, prepare its config, and check that it can be trained and resumed. Every rank; communicates."""
    model = parsed.model
    logger.info("reading the config of %s", model.model_name_or_path)
    source = locate_model(model.model_name_or_path, pick_options(HubOptions, model), world)
    length, rope_parameters = arguments.model_max_length, model.rope_parameters
    config = prepare_config_from(source, world, model_max_length=length, rope_parameters=rope_parameters)
    model_spec = build_model_spec(model, arguments, config, source, world)
    record = RunRecord.of(text_config(config), arguments)
    with collective_stage(world, "comparing the run with the checkpoint"):
        if world.is_main and checkpoint is not None:
            require_same_run(checkpoint.folder, record)
    return source, model_spec, record


def _training_data(preparation: _Preparation, sources: tuple[Source, ...], world: World) -> PreparedDataset:
    """Prepare the training data, packed if that is possible and fills a batch. Every rank; communicates."""
    options, spec = preparation.parsed.data, preparation.model_spec
    batch_size = preparation.arguments.per_device_train_batch_size
    packing = resolve_packing(
        options.packing, text_config(spec.config), attention=spec.attn_implementation, lazy=options.lazy_preprocess
    )
    prepared = preparation.prepare("training data", sources, world, pack=packing.enabled)
    packing = packing_unless_too_few(packing, options.packing, len(prepared.rows), world.world_size * batch_size)
    data = prepared if packing.enabled else prepared.unpacked()
    require_one_batch(data, world_size=world.world_size, per_device_batch_size=batch_size)
    logger.info("  %s", data.packing_note or f"not packed: {packing.reason}")
    return data


def _groups_by_length(parsed: ParsedArguments, data: PreparedDataset) -> bool:
    """Return whether to group samples by length: unless they are packed or lazy, or the user chose how to sample or pack."""
    options = parsed.data
    is_chosen = options.packing is not None or "train_sampling_strategy" in parsed.given_names
    return not (data.is_packed or options.lazy_preprocess or is_chosen)


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


def _with_size(
    record: RunRecord, data: PreparedDataset, preparation: _Preparation, checkpoint: TrainerCheckpoint | None, world: World
) -> RunRecord:
    """Add the size of the data and the number of steps to the record. Every rank; communicates."""
    parsed, arguments = preparation.parsed, preparation.arguments
    rows, tokens = len(data.rows), sum(report.tokens or 0 for report in data.reports)
    record = replace(record, rows=rows, tokens=tokens, max_steps=count_steps(rows, arguments, world.world_size))
    if world.is_main and checkpoint is not None:
        warn_of_other_data(checkpoint.folder, record)
    with collective_stage(world, "counting the steps"):
        require_matching_schedule(arguments, ds_config_name(parsed.training), rows, world.world_size, parsed.given_names)
    return record
