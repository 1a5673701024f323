"""Parse a command line into checked plain values: translate names, convert types, find contradictions.

This touches no device, no process group and no file except the one that the command line names. Every rank gets the same
result. One error lists all problems.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from zero_sft.adapters.options import LoraOptions, unusable_lora_options
from zero_sft.arguments.durations import parse_duration
from zero_sft.arguments.faults import parse_faults
from zero_sft.arguments.groups import DataArguments, ModelArguments
from zero_sft.arguments.names import IGNORED, REFUSALS, REFUSED_OPTIMIZERS, TRANSLATIONS, refused_accelerator_keys
from zero_sft.arguments.patterns import unusable_patterns
from zero_sft.arguments.specifications import ALWAYS_SET, DATA, LORA, MODEL, TRAINING, specifications
from zero_sft.errors import ArgumentError
from zero_sft.loading.options import REMOVED_OPTIONS
from zero_sft.options.resolve import OptionNames
from zero_sft.options.spec import emptiness_errors, positivity_errors

_POSITIVE = (
    "model_max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "save_total_limit", "dataset_num_proc", "dataloader_prefetch_factor", "torch_empty_cache_steps",
    "sequence_parallel_size", "tiled_mlp",
)  # fmt: skip
_STEP_STRATEGIES = {
    "logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": None, "warmup_steps": None
}  # fmt: skip
"""Numbers of steps, which may be a part of all steps below 1, and the option that switches a task off; else 0 does."""
_NEED_EVALUATION_DATA = ("do_eval", "eval_on_start", "load_best_model_at_end", "eval_strategy")
_NEVER_EMPTY = (
    "output_dir", "model_name_or_path", "data_path", "eval_data_path", "sample_prompts", "data_cache_dir", "cache_dir",
    "chat_template", "resume_from_checkpoint", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "lora_weight_path", "unfreeze",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedArguments:
    """The arguments as plain values.

    `training` is the input of `build_training_arguments`: the arguments that the user gave, and always `ALWAYS_SET`.
    `notes` are log lines, one per translated name. `given_names` has the current names of the arguments that the user gave.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraOptions
    training: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    given_names: frozenset[str] = frozenset()


def parse(argv: Sequence[str]) -> ParsedArguments:
    """Read a command line (without the program's name) and the arguments file that it may name. Does not communicate.

    Raises:
        ArgumentError: unknown names, values of a wrong type, refused names, contradictions. One error lists all of them, with
            the nearest known names and with replacements.
    """
    specs = specifications()
    names = OptionNames(specs=specs, translations=TRANSLATIONS, refusals=REFUSALS, removed=REMOVED_OPTIONS, ignored=IGNORED)
    read = names.read(argv)
    values = read.values
    read.require_usable(_unusable_values(values, read.unusable))
    always_set = {name: specs[name].default for name in ALWAYS_SET}
    groups: dict[str, dict[str, Any]] = {MODEL: {}, DATA: {}, LORA: {}, TRAINING: always_set}
    for name, value in values.items():
        groups[specs[name].group][name] = value
    model = ModelArguments(**groups[MODEL])
    groups[TRAINING]["trust_remote_code"] = model.trust_remote_code
    return ParsedArguments(
        model=model,
        data=DataArguments(**groups[DATA]),
        lora=LoraOptions(**groups[LORA]),
        training=MappingProxyType(groups[TRAINING]),
        notes=tuple(dict.fromkeys(read.notes)),
        given_names=frozenset(values),
    )


def _unusable_values(values: Mapping[str, Any], unusable: Set[str]) -> Iterator[ArgumentError]:
    """Yield an error for each combination of values that can't be used, and for values out of range.

    `unusable` has the names of options whose values are errors themselves, and don't count as absent.
    """
    yield from _out_of_range(values)
    has_evaluation_data = values.get("eval_data_path") is not None or "eval_data_path" in unusable
    for name in () if has_evaluation_data else _NEED_EVALUATION_DATA:
        if values.get(name, "no") not in (None, False, "no"):
            yield ArgumentError(
                f"--{name} {values[name]} needs conversations to evaluate on: give --eval_data_path",
                code="arguments.needs_evaluation_data",
            )
    if values.get("bf16") and values.get("fp16"):
        yield ArgumentError("--bf16 True and --fp16 True exclude each other: give only one", code="arguments.contradiction")
    if values.get("label_smoothing_factor") and values.get("eval_strategy", "no") != "no":
        yield ArgumentError(
            "--label_smoothing_factor with --eval_strategy fails in DeepSpeed (0.19): leave one out",
            code="arguments.contradiction",
        )
    yield from unusable_lora_options(values)
    yield from unusable_patterns(values)
    yield from _unusable_with_streaming(values)
    yield from _unusable_checkpoint_options(values)
    yield from _unusable_step_options(values)
    has_metric = values.get("metric_for_best_model") or "metric_for_best_model" in unusable
    if values.get("save_strategy") == "best" and not has_metric:
        yield ArgumentError(
            "--save_strategy best needs a metric: give --metric_for_best_model loss", code="arguments.needs_metric"
        )
    optim = values.get("optim", "")
    if optim in REFUSED_OPTIMIZERS:
        yield ArgumentError(
            f"--optim {optim} can't be used: {REFUSED_OPTIMIZERS[optim]}; see adamw_torch", code="arguments.optimizer_refused"
        )
    if not values.get("deepspeed", "zero3"):
        yield ArgumentError(
            "--deepspeed is empty, but this job shards the model with DeepSpeed ZeRO-3: give zero3 or a file",
            code="arguments.deepspeed_empty",
        )
    yield from _evaluation_precision(values)
    if isinstance(values.get("accelerator_config"), Mapping):
        yield from refused_accelerator_keys(values["accelerator_config"])


def _unusable_with_streaming(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each option that --streaming can't go with: a stream has neither a length nor an end."""
    if not values.get("streaming"):
        return
    if values.get("max_steps", -1) == -1:
        yield ArgumentError(
            "--streaming True does not know how many samples there are: give the length of the run with --max_steps",
            code="arguments.streaming_without_steps",
        )
    refused = [("lazy_preprocess", True), ("train_sampling_strategy", "group_by_length")]
    refused += [(name, "epoch") for name in ("save_strategy", "eval_strategy", "logging_strategy")]
    for name, value in refused:
        if values.get(name) == value:
            yield ArgumentError(
                f"--{name} {value} does not go with --streaming True: leave one out", code="arguments.contradiction"
            )
    if values.get("dataloader_num_workers"):
        yield ArgumentError(
            f"--dataloader_num_workers {values['dataloader_num_workers']} does not go with --streaming True, which has "
            "processes for it (--dataset_num_proc): leave one out",
            code="arguments.contradiction",
        )


def _unusable_checkpoint_options(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each combination of options about checkpoints that can't be used."""
    if values.get("save_only_model") and values.get("load_best_model_at_end"):
        yield ArgumentError(
            "--load_best_model_at_end needs checkpoints with the optimizer's state under DeepSpeed: leave --save_only_model "
            "out",
            code="arguments.needs_whole_checkpoints",
        )
    if values.get("save_on_each_node") and values.get("checkpoint_format") == "deepspeed":
        yield ArgumentError(
            "--save_on_each_node True needs --checkpoint_format sharded", code="arguments.needs_sharded_checkpoints"
        )
    if values.get("local_save_dir") is not None:
        for name, value in (("checkpoint_format", "deepspeed"), ("save_async", False), ("save_only_model", True)):
            if values.get(name) == value:
                yield ArgumentError(
                    f"--local_save_dir does nothing with --{name} {value}: leave one out", code="arguments.no_effect"
                )
    if values.get("on_nan") == "rollback":
        for name, value in (("checkpoint_format", "deepspeed"), ("save_only_model", True), ("save_strategy", "no")):
            if values.get(name) == value:
                yield ArgumentError(
                    f"--on_nan rollback goes back to a checkpoint, which --{name} {value} does not give: leave one out",
                    code="arguments.needs_sharded_checkpoints",
                )


def _unusable_step_options(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each value that a duration, a limit, a fault or a number of steps can't have."""
    for name, parse_value in (("max_time", functools.partial(parse_duration, "max_time")), ("simulate_fault", parse_faults)):
        if values.get(name) is not None:
            try:
                parse_value(str(values[name]))
            except ArgumentError as error:
                yield error
    if values.get("sample_every", 0) < 0:
        yield ArgumentError(f"--sample_every must be at least 0; got {values['sample_every']}", code="arguments.out_of_range")
    elif values.get("sample_every") and values.get("sample_prompts") is None:
        yield ArgumentError("--sample_every needs prompts: give --sample_prompts", code="arguments.no_effect")
    factor = values.get("spike_factor")
    if factor is not None and factor != 0 and factor <= 1:
        yield ArgumentError(
            f"--spike_factor must be above 1, or 0 for no warning; got {factor:g}", code="arguments.out_of_range"
        )
    for name in ("step_timeout", "stage_timeout"):
        limit = values.get(name)
        if limit is not None and not 0 <= limit < math.inf:
            yield ArgumentError(
                f"--{name} must be a number of seconds, 0 for none; got {limit:g}", code="arguments.out_of_range"
            )


def _out_of_range(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each number out of range and each empty name."""
    yield from positivity_errors(values, _POSITIVE)
    yield from _step_count_errors(values)
    max_steps = values.get("max_steps", -1)
    if max_steps < -1 or max_steps == 0:
        yield ArgumentError(
            f"--max_steps must be more than 0, or -1 for --num_train_epochs; got {max_steps}", code="arguments.out_of_range"
        )
    yield from emptiness_errors(values, _NEVER_EMPTY)


def _step_count_errors(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each number of steps that the Trainer would take for another number, or as never."""
    for name, strategy in _STEP_STRATEGIES.items():
        value = values.get(name)
        if value is None:
            continue
        is_counted = strategy is not None and values.get(strategy, "steps") == "steps"
        if value < 0 or (value == 0 and is_counted):
            bound = f"more than 0, or switched off with --{strategy} no" if strategy else "at least 0"
            yield ArgumentError(f"--{name} must be {bound}; got {value:g}", code="arguments.out_of_range")
        elif value > 1 and not float(value).is_integer():
            yield ArgumentError(
                f"--{name} must be a whole number, or below 1 for a part of all steps; got {value:g}",
                code="arguments.out_of_range",
            )


def _evaluation_precision(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error if evaluation and training differ in precision: DeepSpeed's "auto" would use one for both."""
    bf16, fp16 = values.get("bf16"), values.get("fp16", False)
    for name, is_trained_in in (("bf16", not fp16 if bf16 is None else bf16), ("fp16", fp16)):
        if values.get(f"{name}_full_eval") and not is_trained_in:
            yield ArgumentError(
                f"--{name}_full_eval needs --{name} True as well: under DeepSpeed training and evaluation have one precision",
                code="arguments.evaluation_precision",
            )
