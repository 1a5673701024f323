"""Create the Trainer's arguments object from checked values, for the device of this machine.

This step has side effects. It runs on every rank, after the process group exists (on a CPU, DeepSpeed would otherwise compute
wrong batch sizes) and before anything is read. It reports early what the Trainer, DeepSpeed or an optional package would refuse
later. The object must exist before the model is built, because it tells transformers that ZeRO-3 is on.
"""

import logging
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from zero_sft.arguments.ds_conflicts import (
    contradiction_error,
    count_steps,
    find_contradictions,
    find_schedule_contradictions,
    find_unfilled_auto,
    with_auto_for_absent_keys,
)
from zero_sft.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from zero_sft.arguments.training import TrainingArguments

logger = logging.getLogger("zero_sft.train")

UPLOAD = frozenset({"push_to_hub", "hub_model_id", "hub_private_repo"})
"""Arguments that this job reads itself: the Trainer would make its own repository, and upload while it trains."""


def build_training_arguments(
    values: Mapping[str, Any], ds_config: Mapping[str, Any], given: Set[str] = frozenset()
) -> "TrainingArguments":
    """Create the Trainer's arguments from those of the command line and the DeepSpeed config. Every rank; does not communicate.

    The process group must be initialized. On a machine without an accelerator, this sets `use_cpu`, with which bf16 works, and
    drops `tf32`, which only GPUs support, with a line in the log. In the DeepSpeed config of the result
    (`arguments.hf_deepspeed_config`), absent keys and "auto" are filled from the arguments. "auto" remains only where the
    model's width or the number of steps decides.

    Args:
        given: the names of the arguments that the user gave.

    Raises:
        ArgumentError: this machine or the Trainer can't use a value or a combination of values.
        ConfigError: DeepSpeed refuses the config, or the arguments contradict it; lists everything that is wrong.
    """
    from deepspeed.accelerator import get_accelerator

    from zero_sft.arguments.dry_run import dry_run  # imports torch, which --help doesn't need
    from zero_sft.arguments.training import TrainingArguments
    from zero_sft.ds_config import without_auto
    from zero_sft.zero.ds_classes import scheduler_settings
    from zero_sft.zero.ds_schema import schema_problems

    accelerator: Any = get_accelerator()
    fitted = adapt_to_device(
        {name: value for name, value in values.items() if name not in UPLOAD}, accelerator.device_name().partition(":")[0]
    )
    where = ds_config_name(values)
    optim = str(fitted.get("optim", "adamw_torch"))
    schedule = scheduler_settings(ds_config.get("scheduler"))
    config, notes = with_auto_for_absent_keys(ds_config, optim, schedule)
    problems = [*schema_problems(without_auto(config)), *find_unfilled_auto(config, schedule)]
    problems += _unsupported_precision(config, accelerator)
    if problems:
        heading, remedy = f"the DeepSpeed config {where} can't be used:", "See docs/configs.md for the shipped configs."
        raise ConfigError.listing(problems, heading, remedy=remedy, code="ds_config.unusable")
    try:
        arguments = TrainingArguments(**{**fitted, "deepspeed": config})
    except (ValueError, TypeError, NotImplementedError, OSError, KeyError, AttributeError) as error:
        raise ArgumentError(f"the Trainer refuses these arguments: {error}", code="arguments.trainer_refuses") from error
    problems = find_contradictions(config, arguments, given)
    if arguments.max_steps > 0:
        problems += find_schedule_contradictions(config, arguments, arguments.max_steps, given)
    if problems:
        raise contradiction_error(problems, where)

    dry_run(arguments)
    for note in notes:
        logger.info(note)
    return arguments


def require_matching_schedule(arguments: "TrainingArguments", where: str, rows: int, world_size: int, given: Set[str]) -> None:
    """Raise `ConfigError` if the `scheduler` of the DeepSpeed config contradicts the number of steps on `rows` rows."""
    steps = count_steps(rows, arguments, world_size)
    problems = find_schedule_contradictions(arguments.hf_deepspeed_config.config, arguments, steps, given)
    if problems:
        raise contradiction_error(problems, where)


def ds_config_name(values: Mapping[str, Any]) -> str:
    """Return the name of the DeepSpeed config for messages: the value of --deepspeed if it is text."""
    source = values.get("deepspeed")
    return str(source) if isinstance(source, str) else "given with --deepspeed"


def _unsupported_precision(config: Mapping[str, Any], accelerator: Any) -> Iterator[ConfigError]:
    """Yield an error for each precision that the config enables and the device does not support."""
    for name, is_supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if config[name].get("enabled") is True and not is_supported():
            yield ConfigError(
                f"{name}.enabled is true, but DeepSpeed does not support {name} on this machine ({accelerator.device_name()}).",
                code="ds_config.unsupported_precision",
            )


def adapt_to_device(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the values adapted to `device`: "cpu", or the name of an accelerator such as "cuda". Logs what is put aside.

    Raises:
        ArgumentError: a value can't be used on this device.
    """
    fitted = dict(values)
    if device != "cpu":
        if fitted.get("use_cpu"):
            raise ArgumentError(
                f"--use_cpu on a machine with {device}: DeepSpeed uses it already. Start the job with DS_ACCELERATOR=cpu.",
                code="arguments.cpu_on_accelerator",
            )
        return fitted
    remedies = {"fp16": "use --bf16 True", "fp16_full_eval": "leave it out", "activation_offloading": "leave it out"}
    for name, remedy in remedies.items():
        if fitted.get(name):
            raise ArgumentError(
                f"--{name} needs an accelerator, and this machine has none: {remedy}.", code="arguments.needs_accelerator"
            )
    if fitted.pop("tf32", None):
        logger.info("--tf32 is put aside: it only affects NVIDIA GPUs, and this machine has none")
    fitted["use_cpu"] = True
    return fitted
