"""Whether an export would be read back as the model that it was, asked before a byte is written.

A reader builds the model from its config and fills it by name. So a name that this model lacks, or has in another shape, makes
an export that loads with random weights. PEFT's wrappers rename the weights that they adapt: they are merged first.

Nothing here communicates.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zero_sft.errors import ExportError
from zero_sft.loading import skeleton
from zero_sft.transformers_internals import names_not_saved, patterns_not_missed, tied_names

logger = logging.getLogger(__name__)

MERGE_FIRST = (
    "Merge the adapter first:\n"
    "    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):\n"
    "        merged = model.merge_and_unload()\n"
    "and export `merged`; or save the adapter alone, with PEFT."
)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an engine's, DistributedDataParallel's or torch.compile's wrapper.

    Raises:
        ExportError: it is another kind of model, such as PEFT's.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        outer, inner = inner, getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if hasattr(outer, "peft_config") or inner is None:
            remedy = MERGE_FIRST if hasattr(outer, "peft_config") else "Give the model inside of it."
            raise ExportError(
                f"a {type(outer).__name__} can't be exported: nothing reads back the names of its weights. {remedy}",
                code="export.wrapped_model",
            )
    return inner


def require_readable(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Compare what would be written with the model that a reader builds, and warn about what it would leave out.

    Args:
        state: the tensors that would be written, whole, by the model's names; on any device.

    Raises:
        ExportError: the reader's model has tensors that are not there, or in another shape.
    """
    expected = _reader_state(model)
    if expected is None:
        return
    optional = _optional(model)
    absent = [name for name in expected if name not in state and not optional(name)]
    misfits = [name for name, tensor in state.items() if name in expected and expected[name].shape != tensor.shape]
    extra = [name for name in state if name not in expected]
    if absent:
        renamed = f" (they are called {_shown(extra)} now)" if extra else ""
        adapter = MERGE_FIRST if hasattr(model, "peft_config") or any("lora_" in name for name in extra) else _REBUILD
        raise ExportError(
            f"the model has changed since it was loaded: it lacks {_shown(absent)}{renamed}. {adapter}",
            code="export.model_lacks_tensors",
        )
    if misfits:
        name = misfits[0]
        raise ExportError(
            f"the model has changed since it was loaded: {name} has the shape {list(state[name].shape)}, and its config makes "
            f"{list(expected[name].shape)}. Change the config as well.",
            code="export.shape_not_in_config",
        )
    if extra:
        logger.warning(
            "written as well: %s, which %s does not have by its config; plain from_pretrained leaves these out",
            _shown(extra),
            type(model).__name__,
        )


_REBUILD = "Export a model whose modules have the names that its class gives them."


def _reader_state(model: PreTrainedModel) -> Mapping[str, torch.Tensor] | None:
    """The state dict of the model that a reader builds, without data; None where its class can't be built from its config."""
    try:
        fresh = skeleton.build_untied_on_meta(type(model), model.config)
    except Exception as error:  # noqa: BLE001 - constructors of any kind; the training's result must not be lost for them
        logger.warning("%s can't be built again, so its export is not checked: %s", type(model).__name__, error)
        return None
    return {name: tensor for name, tensor in fresh.state_dict().items() if torch.is_tensor(tensor)}


def _optional(model: PreTrainedModel) -> Any:
    """A function that tells whether a reader does without a tensor of that name."""
    tied = set(tied_names(model))
    unsaved = names_not_saved(model)
    patterns = patterns_not_missed(model)
    return lambda name: name in tied or name in unsaved or any(re.search(pattern, name) for pattern in patterns)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
