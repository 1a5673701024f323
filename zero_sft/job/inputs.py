"""Read and check all inputs of the job except the weights: configs, tokenizer, chat template and data."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft import ds_config as ds_configs
from zero_sft.arguments import ParsedArguments, build_training_arguments
from zero_sft.arguments.build import ds_config_name, require_matching_schedule
from zero_sft.arguments.dry_run import require_metric_of_sets
from zero_sft.arguments.ds_conflicts import count_steps, steps_in_epoch
from zero_sft.arguments.vocabulary import added_tokens, required_rows, with_rows
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.config import prepare_config_from
from zero_sft.data import cache
from zero_sft.data.dataset import PreparedDataset, require_one_batch
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.packing import PackingDecision, packing_unless_too_few, resolve_packing
from zero_sft.data.prepare_distributed import prepare_distributed
from zero_sft.data.sources.data_path import (
    HubDataset,
    Source,
    parse_evaluation,
    parse_sources,
    require_outputs_outside,
    require_sources,
)
from zero_sft.data.templates.choose import Template, choose_template
from zero_sft.errors import ArgumentError
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import ModelSource, locate_model
from zero_sft.hub.upload import make_repository
from zero_sft.job.adapter_checks import AdapterPlan, plan_adapters
from zero_sft.job.ending_early import remove_stop_file
from zero_sft.job.generation import read_prompts, require_answerable
from zero_sft.job.start_checks import check_model, prepare_export_settings
from zero_sft.job.trained_part import require_matches
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import ModelSpec
from zero_sft.options.keywords import pick_options
from zero_sft.rope import text_config
from zero_sft.saving.earlier_run import LOGS, overwrites_earlier_run
from zero_sft.saving.folder import explain_write_errors, require_usable_local_folder, require_writable_everywhere, resolved
from zero_sft.saving.placing import ADAPTER_SETTINGS, SETTINGS, require_replaceable
from zero_sft.saving.resume import AUTO, agree_on_checkpoint
from zero_sft.saving.resume_step import ENDLESS, log_other_steps, step_of_same_sample
from zero_sft.saving.run_record import RunRecord, read_record, require_same_run, warn_of_other_data
from zero_sft.saving.trainer_checkpoint import TrainerCheckpoint, require_no_checkpoint
from zero_sft.tokenizer import load_tokenizer_from

if TYPE_CHECKING:
    from zero_sft.data.streamed import StreamedData
    from zero_sft.job.stream_place import StreamPlace

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The checked inputs of the job.

    Attributes:
        arguments: the `TrainingArguments`.
        model_spec: the checked model, before its weights are read; see `check_model`.
        saved_tokenizer: the tokenizer that checkpoints and the export hold, with the chat template of the run.
        generation_config: the export's, which stops at the template's ends of turn.
        record: describes the run in its checkpoints.
        checkpoint: the run resumes from it.
        overwrites_run: whether this run overwrites an earlier run in the output folder.
        stored_rows: rows of the embedding in the model's files; `model_spec` has more if tokens were added.
        adapter: the adapters that are trained; None: the model is.
        repository: the repository on the hub to which the model is uploaded; None: it is not.
        stream_place: where the run begins in its training data, if that is streamed.
    """

    arguments: Any
    model_source: ModelSource
    model_spec: ModelSpec
    stored_rows: int | None
    tokenizer: Any
    saved_tokenizer: Any
    template: Template
    training_data: "PreparedDataset | StreamedData"
    evaluation_data: dict[str, PreparedDataset]
    prompts: tuple[str, ...]
    generation_config: Any
    record: RunRecord
    checkpoint: TrainerCheckpoint | None
    overwrites_run: bool
    adapter: AdapterPlan | None
    repository: str | None
    stream_place: "StreamPlace | None"

    @property
    def log_folder(self) -> Path:
        """The folder for the run's logs and metrics."""
        return Path(self.arguments.output_dir) / LOGS


@dataclass(frozen=True, slots=True, kw_only=True)
class _DataSources:
    """The data sources for training, and those of the sets for evaluation, by name."""

    training: tuple[Source, ...]
    evaluation: dict[str, tuple[Source, ...]]

    @property
    def all_evaluation(self) -> tuple[Source, ...]:
        """The sources of all sets for evaluation."""
        return tuple(chain.from_iterable(self.evaluation.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preparation:
    """The settings with which this run turns its training and evaluation sources into rows."""

    parsed: ParsedArguments
    arguments: Any
    tokenizer: Any
    template: Template
    model_spec: ModelSpec

    def spec(self, sources: tuple[Source, ...], *, pack: bool) -> DatasetSpec:
        """Return what determines the rows of `sources`."""
        return DatasetSpec.from_options(
            self.parsed.data,
            self.arguments,
            sources=sources,
            pack=pack,
            embedding_rows=getattr(text_config(self.model_spec.config), "vocab_size", None),
        )

    def packing(self) -> PackingDecision:
        """Decide whether the training data is packed; raise `ArgumentError` if that is wanted but not possible."""
        options, spec = self.parsed.data, self.model_spec
        return resolve_packing(
            options.packing, text_config(spec.config), attention=spec.attn_implementation, lazy=options.lazy_preprocess
        )

    def prepare(self, title: str, sources: tuple[Source, ...], world: World, *, pack: bool = False) -> PreparedDataset:
        """Prepare the data of `sources`, and log its report under `title`. Every rank; communicates."""
        dataset_spec = self.spec(sources, pack=pack)
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
    arguments, prompts, data_sources = _build_arguments(parsed, world)
    repository = _make_repository(parsed.training, world)
    checkpoint = _find_checkpoint(parsed, arguments, world)
    overwrites_run = _check_data_and_output(parsed, arguments, data_sources, checkpoint, world)
    model_source, stored_spec = _check_model(parsed, arguments, world)
    tokenizer, model_spec = _load_tokenizer(parsed, arguments, model_source, stored_spec, world)
    adapter, record = _check_record(parsed, arguments, model_source, model_spec, checkpoint, world)
    with collective_stage(world, "choosing the chat template"):
        template = choose_template(parsed.data.chat_template, tokenizer)
        if world.is_main:
            require_answerable(prompts, tokenizer, template, model_spec.config)
    generation_config, saved_tokenizer = prepare_export_settings(model_spec.config, tokenizer, template, model_source, world)
    preparation = _Preparation(
        parsed=parsed, arguments=arguments, tokenizer=tokenizer, template=template, model_spec=model_spec
    )
    stream_place = None
    if parsed.data.streaming:
        training_data, record, stream_place = _streamed_data(preparation, data_sources.training, record, checkpoint, world)
    else:
        training_data = _training_data(preparation, data_sources.training, world)
        if _groups_by_length(parsed, training_data):
            arguments.train_sampling_strategy = "group_by_length"
        record = _with_size(record, training_data, arguments)
    data = [source.data.name if isinstance(source.data, HubDataset) else Path(source.data.name).name
            for source in data_sources.training]  # fmt: skip
    base = model_source.name if model_source.folder is None else model_source.folder.resolve().name
    record = replace(record, model=base, data=data, order_samples=_order_samples(record, checkpoint))
    _check_size(record, preparation, checkpoint, world)
    evaluation_data = _evaluation_data(preparation, data_sources.evaluation, world)
    return Inputs(
        arguments=arguments,
        model_source=model_source,
        model_spec=model_spec,
        stored_rows=getattr(text_config(stored_spec.config), "vocab_size", None),
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
        adapter=adapter,
        repository=repository,
        stream_place=stream_place,
    )


def _build_arguments(parsed: ParsedArguments, world: World) -> tuple[Any, tuple[str, ...], _DataSources]:
    """Build the Trainer's arguments, read the prompts, and parse the data sources. Every rank; communicates."""
    training, data = parsed.training, parsed.data
    with collective_stage(world, "checking the DeepSpeed config and the arguments"):
        ds_config = ds_configs.load_ds_config(training["deepspeed"])
        ds_config["zero_optimization"].update(ds_configs.hpz_size(ds_config, world.node_group_size, world.world_size))
        ds_configs.require_nvme(ds_config)
        arguments = build_training_arguments(training, ds_config, parsed.given_names)
        prompts = tuple(read_prompts(Path(data.sample_prompts))) if data.sample_prompts else ()
        _require_other_folder(parsed.model.model_name_or_path, training["output_dir"])
        data_sources = _DataSources(
            training=parse_sources(data.training_path),
            evaluation={} if data.eval_data_path is None else parse_evaluation(data.eval_data_path),
        )
        require_metric_of_sets(arguments.metric_for_best_model, data_sources.evaluation)
    return arguments, prompts, data_sources


def _require_other_folder(model: str, output_dir: str) -> None:
    with contextlib.suppress(OSError):  # one of the folders does not exist
        if Path(model).samefile(output_dir):
            raise ArgumentError(
                f"--output_dir {output_dir} is the folder of the model, whose weights would be replaced. Name another folder.",
                code="export.into_the_models_folder",
            )


def _make_repository(training: Mapping[str, Any], world: World) -> str | None:
    """Return the id of the repository for the model, which is made now, so that a refusal comes early; None without an upload.

    Every rank; communicates.

    Raises:
        ExportError: the hub can't be reached, or the token may not write there.
    """
    name, private = training.get("hub_model_id"), training.get("hub_private_repo")
    with collective_stage(world, "making the repository on the hub") as exchange:
        if not training.get("push_to_hub"):
            if name or private:
                raise ArgumentError(
                    "--hub_model_id and --hub_private_repo do nothing without --push_to_hub True", code="arguments.no_effect"
                )
        elif world.is_main:
            exchange.local = make_repository(name or resolved(training["output_dir"]).name, private=private)
    return exchange.gathered[0]


def _find_checkpoint(parsed: ParsedArguments, arguments: Any, world: World) -> TrainerCheckpoint | None:
    """Return the checkpoint that the run resumes from; None for a new run. Every rank; communicates."""
    training, hf_config = parsed.training, arguments.hf_deepspeed_config
    return agree_on_checkpoint(
        training["resume_from_checkpoint"],
        training["output_dir"],
        world,
        hf_config.config,
        dtype="bfloat16"
        if hf_config.is_true("bf16.enabled")
        else "float16"
        if hf_config.is_true("fp16.enabled")
        else "float32",
        on_each_node=bool(training.get("save_on_each_node")),
    )


def _check_data_and_output(
    parsed: ParsedArguments, arguments: Any, data_sources: _DataSources, checkpoint: TrainerCheckpoint | None, world: World
) -> bool:
    """Check that the data is there and the output can be written. Every rank; communicates.

    Sets `arguments.save_on_each_node` to whether the nodes have separate output folders, if the user allows that.

    Returns:
        Whether this run overwrites an earlier run in the output folder.
    """
    output_dir = parsed.training["output_dir"]
    with collective_stage(world, "checking the data and the output folder") as exchange:
        if world.is_main:
            require_no_checkpoint(Path(output_dir).expanduser(), "Name the run's folder with --output_dir.")
            require_outputs_outside((*data_sources.training, *data_sources.all_evaluation), output_dir)
            require_sources(data_sources.training)
            require_sources(data_sources.all_evaluation, to_evaluate=True)
            exchange.local = overwrites_earlier_run(
                output_dir,
                checkpoint and checkpoint.folder,
                overwrite=parsed.training["overwrite_output_dir"],
                model=parsed.model.model_name_or_path,
                resumes_if_possible=parsed.training["resume_from_checkpoint"] == AUTO,
            )
            writes_model = not parsed.lora.enabled or parsed.lora.merge_adapter
            require_replaceable(resolved(output_dir), SETTINGS if writes_model else ADAPTER_SETTINGS)
            with explain_write_errors(output_dir):
                remove_stop_file(Path(output_dir).expanduser())
    overwrites = exchange.gathered[0]
    is_shared = require_writable_everywhere(output_dir, world, on_each_node=arguments.save_on_each_node)
    arguments.save_on_each_node = not is_shared
    with collective_stage(world, "checking --local_save_dir"):
        if arguments.local_save_dir is not None:
            require_usable_local_folder(Path(arguments.local_save_dir).expanduser())
    return overwrites


def _check_model(parsed: ParsedArguments, arguments: Any, world: World) -> tuple[ModelSource, ModelSpec]:
    """Locate the model, and check that it can be trained. Every rank; communicates."""
    model = parsed.model
    logger.info("reading the config of %s", model.model_name_or_path)
    source = locate_model(model.model_name_or_path, pick_options(HubOptions, model), world)
    length, rope_parameters = arguments.model_max_length, model.rope_parameters
    config = prepare_config_from(source, world, model_max_length=length, rope_parameters=rope_parameters)
    return source, check_model(model, arguments, config, source, world)


def _load_tokenizer(
    parsed: ParsedArguments, arguments: Any, source: ModelSource, spec: ModelSpec, world: World
) -> tuple[Any, ModelSpec]:
    """Load the tokenizer with its added tokens; return it, and the model with rows for them. Every rank; communicates."""
    tokenizer = load_tokenizer_from(
        source,
        world,
        model_max_length=arguments.model_max_length,
        padding_side=parsed.model.padding_side,
        added=added_tokens(parsed.model),
    )
    with collective_stage(world, "comparing the tokenizer with the model"):
        rows = required_rows(parsed.model, tokenizer, spec.config, has_adapters=parsed.lora.enabled)
    return tokenizer, replace(spec, config=with_rows(spec.config, rows))


def _check_record(
    parsed: ParsedArguments,
    arguments: Any,
    source: ModelSource,
    spec: ModelSpec,
    checkpoint: TrainerCheckpoint | None,
    world: World,
) -> tuple[AdapterPlan | None, RunRecord]:
    """Check what is trained, and that the run can be resumed. Every rank; communicates."""
    adapter = plan_adapters(parsed.lora, pick_options(LoadOptions, parsed.model), spec, source, world)
    require_matches(arguments, parsed.lora, spec, world)
    record = RunRecord.of(text_config(spec.config), arguments, adapter.settings if adapter else {})
    with collective_stage(world, "comparing the run with the checkpoint"):
        if world.is_main and checkpoint is not None:
            require_same_run(checkpoint.folder, record, at_same_sample=checkpoint.sharded)
    return adapter, record


def _training_data(preparation: _Preparation, sources: tuple[Source, ...], world: World) -> PreparedDataset:
    """Prepare the training data, packed if that is possible and fills a batch. Every rank; communicates."""
    options, arguments = preparation.parsed.data, preparation.arguments
    batch_size, packing = arguments.per_device_train_batch_size, preparation.packing()
    prepared = preparation.prepare("training data", sources, world, pack=packing.enabled)
    packing = packing_unless_too_few(packing, options.packing, len(prepared.rows), arguments.data_ranks * batch_size)
    data = prepared if packing.enabled else prepared.unpacked()
    require_one_batch(data, world_size=arguments.data_ranks, per_device_batch_size=batch_size)
    logger.info("  %s", data.packing_note or f"not packed: {packing.reason}")
    return data


def _streamed_data(
    preparation: _Preparation,
    sources: tuple[Source, ...],
    record: RunRecord,
    checkpoint: TrainerCheckpoint | None,
    world: World,
) -> "tuple[StreamedData, RunRecord, StreamPlace]":
    """Begin to stream the training data where the run goes on. Every rank; communicates.

    Sets `arguments.train_sampling_strategy`, since the stream itself shuffles.

    Returns:
        The data, the record with the steps, and the place in the data.
    """
    from zero_sft.data.dataset import warnings_of
    from zero_sft.data.streamed import stream_data
    from zero_sft.job.stream_place import find_place

    arguments = preparation.arguments
    packing = preparation.packing()
    spec = preparation.spec(sources, pack=packing.enabled)
    logger.info("training data, streamed: %s", spec.name)
    record = replace(record, max_steps=arguments.max_steps, steps_an_epoch=ENDLESS)
    shuffle = arguments.train_sampling_strategy != "sequential"
    arguments.train_sampling_strategy = "sequential"
    with collective_stage(world, "finding the place in the data"):
        pipeline = spec.pipeline(preparation.tokenizer, preparation.template)
        weights, contents = [source.weight for source in sources], [source.data.fingerprint() for source in sources]
        made_by = hashlib.sha256(json.dumps(cache.pipeline_identity(pipeline), sort_keys=True).encode()).hexdigest()
        identity = json.loads(json.dumps([shuffle, spec.seed, packing.enabled, weights, contents, made_by]))
        place = find_place(checkpoint and checkpoint.folder, record, identity, is_main=world.is_main)
    data = stream_data(
        spec,
        pipeline,
        world,
        length=arguments.max_steps * record.samples_a_step,
        rows_a_step=record.samples_a_step,
        shuffle=shuffle,
        states=place.states,
        begin_at=place.row,
    )
    for line in (line for report in data.reports for line in report.lines()):
        logger.info("  %s", line)
    for warning in warnings_of(data.reports) if world.is_main else ():
        logger.warning(warning)
    logger.info("  %s", "packed block by block" if packing.enabled else f"not packed: {packing.reason}")
    return data, record, place


def _groups_by_length(parsed: ParsedArguments, data: PreparedDataset) -> bool:
    """Return whether to group samples by length: unless they are packed or lazy, or the user chose how to sample or pack."""
    options = parsed.data
    is_chosen = options.packing is not None or "train_sampling_strategy" in parsed.given_names
    return not (data.is_packed or options.lazy_preprocess or is_chosen)


def _evaluation_data(
    preparation: _Preparation, sets: Mapping[str, tuple[Source, ...]], world: World
) -> dict[str, PreparedDataset]:
    """Prepare the sets of evaluation data, by name; none without an evaluation. Every rank; communicates."""
    arguments = preparation.arguments
    if sets and arguments.eval_strategy == "no" and not arguments.eval_on_start:
        if world.is_main:
            logger.warning("--eval_data_path has no effect without --eval_strategy: the run does not evaluate")
        return {}
    return {
        name: preparation.prepare(" ".join(filter(None, ("evaluation data", name))), sources, world)
        for name, sources in sets.items()
    }


def _order_samples(record: RunRecord, checkpoint: TrainerCheckpoint | None) -> int:
    """Return the samples per step by which samples are grouped by length: those of the run's first start."""
    then = read_record(checkpoint.folder) if checkpoint is not None and checkpoint.sharded else None
    return record.samples_a_step if then is None else then.order_samples or then.samples_a_step or record.samples_a_step


def _with_size(record: RunRecord, data: PreparedDataset, arguments: Any) -> RunRecord:
    """Return the record with the size of the data and the number of steps. Pure."""
    rows = len(data.rows)
    return replace(
        record,
        rows=rows,
        tokens=sum(report.tokens or 0 for report in data.reports),
        max_steps=count_steps(rows, arguments, arguments.data_ranks),
        steps_an_epoch=steps_in_epoch(rows, arguments, arguments.data_ranks),
    )


def _check_size(record: RunRecord, preparation: _Preparation, checkpoint: TrainerCheckpoint | None, world: World) -> None:
    """Compare the steps with the checkpoint's, and refuse a DeepSpeed schedule of other steps. Every rank; communicates."""
    parsed, arguments = preparation.parsed, preparation.arguments
    if world.is_main and checkpoint is not None and (then := read_record(checkpoint.folder)) is not None:
        last_step = then.max_steps
        if checkpoint.sharded:
            log_other_steps(checkpoint.global_step, then, record)
            last_step = step_of_same_sample(then.max_steps, then, record)
        warn_of_other_data(then, record, last_step)
    with collective_stage(world, "counting the steps"):
        name = ds_config_name(parsed.training)
        require_matching_schedule(arguments, name, record.rows, preparation.arguments.data_ranks, parsed.given_names)
