"""Check adapters before the weights are read: do they fit the model, and what will be saved of them?"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.adapters.options import LoraOptions
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta

logger = logging.getLogger("zero_sft.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """The adapters of a run.

    Attributes:
        settings: those that a checkpoint depends on, for its record.
        nbytes: bytes of the saved adapter.
        numel: its elements.
        merge: whether the run ends with a merged model.
    """

    settings: dict[str, Any]
    nbytes: int
    numel: int
    merge: bool


def plan_adapters(options: LoraOptions, spec: ModelSpec, world: World) -> AdapterPlan | None:
    """Add the adapters to a model without weights, and return what they are; None without LoRA. Every rank; communicates.

    Raises:
        ArgumentError: the model has no such modules, or PEFT can't adapt them.
        CheckpointError: the adapter to train on can't be read, or is of another model.
    """
    if not options.enabled:
        return None
    from zero_sft.adapters.attach import adapted_on_meta, lora_config, recorded_settings
    from zero_sft.adapters.files import read_adapter_header
    from zero_sft.adapters.peft_internals import saved_tensors

    with collective_stage(world, "planning the adapters") as exchange:
        if world.is_main:
            config = lora_config(options)
            model, _ = build_on_meta(spec)
            tensors = saved_tensors(adapted_on_meta(model, config, merge=options.merge_adapter))
            if options.lora_weight_path is not None:
                read_adapter_header(Path(options.lora_weight_path).expanduser(), tensors)
            numel = sum(tensor.numel() for tensor in tensors.values())
            exchange.local = [recorded_settings(config), numel * spec.dtype.itemsize, numel]
    settings, nbytes, numel = exchange.gathered[0]
    return AdapterPlan(settings=settings, nbytes=nbytes, numel=numel, merge=options.merge_adapter)
