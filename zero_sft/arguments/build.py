"""From checked values to the Trainer's arguments object, on the device that this machine has.

This is the step with side effects. It runs on every rank, after the process group exists (on a CPU, DeepSpeed's batch sizes
are wrong otherwise) and before the model is built (transformers learns of ZeRO-3 from the object).
"""

import copy
import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zero_sft.arguments.names import refused_accelerator_key
from zero_sft.errors import ArgumentError

if TYPE_CHECKING:
    from zero_sft.arguments.training import TrainingArguments

logger = logging.getLogger(__name__)


def build_training_arguments(values: Mapping[str, Any], ds_config: Mapping[str, Any]) -> "TrainingArguments":
    """Make the Trainer's arguments from `Parsed.training` and the DeepSpeed config as read. Every rank; does not communicate.

    `distributed.connect` must have run. On a machine without an accelerator `use_cpu` is set, with which bf16 works, and
    `tf32`, which speeds up GPUs alone, is put aside with a line in the log.

    Raises:
        ArgumentError: a value or a combination that this machine or the Trainer can't use.
    """
    from deepspeed.accelerator import get_accelerator

    from zero_sft.arguments.training import TrainingArguments

    accelerator: Any = get_accelerator()
    device = accelerator.device_name().partition(":")[0]
    fitted = fit_to_device(values, device)
    if fitted.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ArgumentError("--use_liger_kernel needs a package that isn't installed: pip install liger-kernel")
    try:
        arguments = TrainingArguments(**{**fitted, "deepspeed": copy.deepcopy(dict(ds_config))})
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise ArgumentError(f"the Trainer refuses these arguments: {error}") from error
    refused = refused_accelerator_key(vars(arguments.accelerator_config))  # they may have come from a file
    if refused:
        raise ArgumentError(refused)
    return arguments


def fit_to_device(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The values as they can be used on `device`, "cpu" or an accelerator's name such as "cuda". Pure, but for the log.

    Raises:
        ArgumentError: a value that can't be used there.
    """
    fitted = dict(values)
    if device != "cpu":
        if fitted.get("use_cpu"):
            raise ArgumentError(
                f"--use_cpu on a machine with {device}: DeepSpeed has taken it already. Start the job with DS_ACCELERATOR=cpu."
            )
        return fitted
    for name, instead in (
        ("fp16", "use --bf16 True"),
        ("fp16_full_eval", "leave it out"),
        ("activation_offloading", "leave it out"),
    ):
        if fitted.get(name):
            raise ArgumentError(f"--{name} needs an accelerator, and this machine has none: {instead}.")
    if fitted.pop("tf32", None):
        logger.info("--tf32 is put aside: it speeds up NVIDIA GPUs, and this machine has none")
    fitted["use_cpu"] = True
    return fitted
