"""Check adapters before the weights are read: do they fit the model, and what will be saved of them?"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.adapters.options import LoraOptions
from zero_sft.checkpoint.folder_kind import BASE_CONFIG
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.config import load_config
from zero_sft.hub.source import CONFIG, ModelSource, fetch_files
from zero_sft.loading import four_bit
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta
from zero_sft.rope import text_config

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


def plan_adapters(
    options: LoraOptions, load_options: LoadOptions, spec: ModelSpec, source: ModelSource, world: World
) -> AdapterPlan | None:
    """Add the adapters to a model without weights, and return what they are; None without LoRA. Every rank; communicates.

    Raises:
        ArgumentError: the model has no such modules, or PEFT can't adapt them.
        CheckpointError: the adapter to train on can't be read, or is of another model.
    """
    if not options.enabled:
        return None
    from zero_sft.adapters.attach import adapted_on_meta, lora_config, recorded_settings, require_all_found
    from zero_sft.adapters.files import read_adapter_header
    from zero_sft.adapters.peft_internals import saved_tensors

    folder = fetch_files(source, world, CONFIG)
    with collective_stage(world, "planning the adapters") as exchange:
        if world.is_main:
            if not options.merge_adapter:
                _warn_of_scaling(folder, spec, source)
            config = lora_config(options)
            if load_options.load_in_4bit:
                four_bit.require_bitsandbytes()
            model = four_bit.make_all_4bit(build_on_meta(spec)[0], load_options)
            adapted = adapted_on_meta(model, config, merge=options.merge_adapter)
            require_all_found(adapted, options)
            tensors = saved_tensors(adapted)
            if options.lora_weight_path is not None:
                read_adapter_header(Path(options.lora_weight_path).expanduser(), tensors)
            numel = sum(tensor.numel() for tensor in tensors.values())
            settings = {**recorded_settings(config), **four_bit.recorded_settings(load_options)}
            exchange.local = [settings, numel * spec.dtype.itemsize, numel]
    settings, nbytes, numel = exchange.gathered[0]
    return AdapterPlan(settings=settings, nbytes=nbytes, numel=numel, merge=options.merge_adapter)


def _warn_of_scaling(folder: Path, spec: ModelSpec, source: ModelSource) -> None:
    """Warn if the adapter is trained on other positions than its base model has for those who load the two."""
    stored = getattr(text_config(load_config(folder, source.options)), "rope_parameters", None)
    if stored != getattr(text_config(spec.config), "rope_parameters", None):
        logger.warning(
            "the adapter is trained on a base model with scaled RoPE, which an adapter does not hold: whoever loads the two "
            "has to set rope_parameters as in %s next to it. --merge_adapter True writes a model that has them.", BASE_CONFIG,
        )  # fmt: skip
