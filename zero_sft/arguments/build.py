"""From checked values to the Trainer's arguments object, on the device that this machine has.

This is the step with side effects. It runs on every rank, after the process group exists (on a CPU, DeepSpeed's batch sizes
are wrong otherwise) and before anything is read: whatever the Trainer, DeepSpeed or an optional package would refuse later is
refused here. transformers learns of ZeRO-3 from the object, so it must exist before the model is built.
"""

import logging
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from zero_sft.arguments.ds_conflicts import (
    complete_config,
    conflict_error,
    count_steps,
    find_conflicts,
    find_schedule_conflicts,
    schema_error,
)
from zero_sft.arguments.names import refused_accelerator_key
from zero_sft.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from zero_sft.arguments.training import TrainingArguments

logger = logging.getLogger("zero_sft.train")


def build_training_arguments(
    values: Mapping[str, Any], ds_config: Mapping[str, Any], given: Set[str] = frozenset()
) -> "TrainingArguments":
    """Make the Trainer's arguments from `Parsed.training` and the DeepSpeed config as read. Every rank; does not communicate.

    `distributed.connect` must have run. On a machine without an accelerator `use_cpu` is set, with which bf16 works, and
    `tf32`, which speeds up GPUs alone, is put aside with a line in the log. The DeepSpeed config of the result has "auto" for
    what the given one leaves open (`arguments.hf_deepspeed_config`).

    Args:
        given: the names of the arguments that the user gave.

    Raises:
        ArgumentError: a value or a combination that this machine or the Trainer can't use.
        ConfigError: a DeepSpeed config that DeepSpeed refuses or the arguments contradict; names everything that is wrong.
    """
    from deepspeed.accelerator import get_accelerator

    from zero_sft.arguments.dry_run import dry_run  # torch, without which --help answers at once
    from zero_sft.arguments.training import TrainingArguments
    from zero_sft.ds_config import without_auto
    from zero_sft.zero.ds_schema import scheduler_settings, schema_problems

    accelerator: Any = get_accelerator()
    fitted = fit_to_device(values, accelerator.device_name().partition(":")[0])
    where = ds_config_name(values)
    optim = str(fitted.get("optim", "adamw_torch"))
    config, notes = complete_config(ds_config, optim, scheduler_settings(ds_config.get("scheduler")))
    problems = [*schema_problems(without_auto(config)), *_unsupported_precision(config, accelerator)]
    if problems:
        raise schema_error(problems, where)
    try:
        arguments = TrainingArguments(**{**fitted, "deepspeed": config})
    except (ValueError, TypeError, NotImplementedError, OSError, KeyError, AttributeError) as error:
        raise ArgumentError(f"the Trainer refuses these arguments: {error}", code="arguments.trainer_refuses") from error
    refused = refused_accelerator_key(vars(arguments.accelerator_config))  # they may have come from a file
    if refused:
        raise ArgumentError(refused, code="arguments.accelerator_key")
    problems = find_conflicts(config, arguments, given, arguments.world_size)
    if arguments.max_steps > 0:
        problems += find_schedule_conflicts(config, arguments, arguments.max_steps, given)
    if problems:
        raise conflict_error(problems, where)

    dry_run(arguments)
    for note in notes:
        logger.info(note)
    return arguments


def require_matching_schedule(arguments: "TrainingArguments", where: str, rows: int, world_size: int, given: Set[str]) -> None:
    """Raise `ConfigError` if the DeepSpeed config's `scheduler` contradicts the number of steps on `rows` rows."""
    steps = count_steps(rows, arguments, world_size)
    problems = find_schedule_conflicts(arguments.hf_deepspeed_config.config, arguments, steps, given)
    if problems:
        raise conflict_error(problems, where)


def ds_config_name(values: Mapping[str, Any]) -> str:
    """The name of the DeepSpeed config for messages: what --deepspeed was, if it was text."""
    source = values.get("deepspeed")
    return str(source) if isinstance(source, str) else "given with --deepspeed"


def _unsupported_precision(config: Mapping[str, Any], accelerator: Any) -> list[ConfigError]:
    """A precision that is switched on in the config and that DeepSpeed's device does not compute in."""
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    return [
        ConfigError(
            f"{name}.enabled is true, and DeepSpeed does not support {name} on this machine ({accelerator.device_name()}).",
            code="ds_config.unsupported_precision",
        )
        for name, is_supported in supported.items()
        if config[name].get("enabled") is True and not is_supported()
    ]


def fit_to_device(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The values as they can be used on `device`, "cpu" or an accelerator's name such as "cuda". Pure, but for the log.

    Raises:
        ArgumentError: a value that can't be used there.
    """
    fitted = dict(values)
    if device != "cpu":
        if fitted.get("use_cpu"):
            raise ArgumentError(
                f"--use_cpu on a machine with {device}: DeepSpeed has taken it already. Start the job with DS_ACCELERATOR=cpu.",
                code="arguments.cpu_on_accelerator",
            )
        return fitted
    for name, instead in (
        ("fp16", "use --bf16 True"),
        ("fp16_full_eval", "leave it out"),
        ("activation_offloading", "leave it out"),
    ):
        if fitted.get(name):
            raise ArgumentError(
                f"--{name} needs an accelerator, and this machine has none: {instead}.", code="arguments.needs_accelerator"
            )
    if fitted.pop("tf32", None):
        logger.info("--tf32 is put aside: it speeds up NVIDIA GPUs, and this machine has none")
    fitted["use_cpu"] = True
    return fitted
