"""Check, before anything is written, that an export would load back as the same model.

A reader builds the model from its config and fills it by name. If the trained model lacks a name, or has it in another shape,
the export would load with random weights. An adapter renames the weights of the model inside PEFT's, which can't be saved alone
then.

Nothing here communicates.
"""

import logging
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zero_sft.errors import ExportError
from zero_sft.loading import skeleton
from zero_sft.printable import first_of
from zero_sft.transformers_internals import names_not_saved, patterns_not_missed, tied_names

logger = logging.getLogger(__name__)

MERGE_FIRST = (
    "Give PEFT's model, of which the adapter is saved. Or merge the adapter first:\n"
    "    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):\n"
    "        merged = model.merge_and_unload()\n"
    "and save `merged`."
)

_REBUILD = "Export a model whose modules have the names that its class gives them."


def unwrapped(model: nn.Module) -> Any:
    """Unwrap the model of transformers or PEFT from a DeepSpeed engine, DistributedDataParallel or torch.compile.

    Raises:
        ExportError: the model is of another kind.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel) and not is_adapted(inner):
        outer, inner = inner, getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            raise ExportError(
                f"a {type(outer).__name__} can't be exported: no reader knows the names of its weights. "
                "Give the model inside it.",
                code="export.wrapped_model",
            )
    return inner


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model is one that PEFT wraps. PEFT is not imported for others."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return False
    from zero_sft.adapters import peft_internals

    return peft_internals.is_adapted(model)


def require_loads_back(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Compare the tensors to write with the model that a reader builds, and warn about tensors that it would leave out.

    Args:
        state: the tensors to write, in full shapes, under the model's names; on any device.

    Raises:
        ExportError: the reader's model has tensors that `state` lacks or holds in another shape.
    """
    expected = _reader_state(model)
    if expected is None:
        return
    missing = missing_names(model, expected, state)
    mismatched = [name for name, tensor in state.items() if name in expected and expected[name].shape != tensor.shape]
    unexpected = [name for name in state if name not in expected]
    if missing:
        renamed = f" (they are called {first_of(unexpected)} now)" if unexpected else ""
        remedy = MERGE_FIRST if hasattr(model, "peft_config") or any("lora_" in name for name in unexpected) else _REBUILD
        raise ExportError(
            f"the model has changed since it was loaded: it lacks {first_of(missing)}{renamed}. {remedy}",
            code="export.model_lacks_tensors",
        )
    if mismatched:
        name = mismatched[0]
        raise ExportError(
            f"the model has changed since it was loaded: {name} has the shape {list(state[name].shape)}, but its config "
            f"expects {list(expected[name].shape)}. Change the config as well.",
            code="export.shape_not_in_config",
        )
    if unexpected:
        logger.warning(
            "written as well: %s, which %s does not have by its config; plain from_pretrained leaves these out",
            first_of(unexpected),
            type(model).__name__,
        )


def missing_names(model: PreTrainedModel, expected: Iterable[str], given: Container[str]) -> list[str]:
    """Return the expected names that are not given, without those that a reader ties or makes itself."""
    optional, patterns = {*tied_names(model), *names_not_saved(model)}, patterns_not_missed(model)
    missing = [name for name in expected if name not in given and name not in optional]
    return [name for name in missing if not any(re.search(pattern, name) for pattern in patterns)]


def _reader_state(model: PreTrainedModel) -> Mapping[str, torch.Tensor] | None:
    """Return the state dict of the model that a reader builds, without data; None if its config does not build its class."""
    try:
        rebuilt = skeleton.build_untied_on_meta(type(model), model.config)
    except Exception as error:  # noqa: BLE001 - any model's constructor runs here; an error must not cost the trained weights
        logger.warning("%s can't be built again, so its export is not checked: %s", type(model).__name__, error)
        return None
    return {name: tensor for name, tensor in rebuilt.state_dict().items() if torch.is_tensor(tensor)}
