"""Prepare the export's generation settings, and check before the weights are read that all settings can be saved."""

import copy
import logging
from typing import Any

from transformers import GenerationConfig

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.templates.choose import Template
from zero_sft.generation_config import eos_token_ids, inconsistent_settings, read_generation_config, stop_at, turn_ends
from zero_sft.hub.source import CONFIG, ModelSource, fetch_files
from zero_sft.saving.settings import rehearse_settings

logger = logging.getLogger("zero_sft.train")


def check_export_settings(
    config: Any, tokenizer: Any, template: Template, source: ModelSource, world: World
) -> tuple[GenerationConfig, Any]:
    """Return the generation config and the tokenizer of the export, after a trial save. Every rank; communicates.

    Raises:
        ExportError, ConfigError: a setting that the export needs can't be read or saved.
    """
    folder = fetch_files(source, world, CONFIG)
    with collective_stage(world, "trying to save the settings"):
        generation_config, _ = read_generation_config(folder)  # the loader warns about settings that are refused
        ends, stored_ids = turn_ends(tokenizer, template.turn_ends), eos_token_ids(generation_config)
        added_ids = stop_at(generation_config, ends)
        saved_tokenizer = copy.deepcopy(tokenizer)
        saved_tokenizer.chat_template = template.jinja(tokenizer)
        if world.is_main:
            rehearse_settings(config, generation_config, saved_tokenizer)
    if world.is_main:
        if names := inconsistent_settings(generation_config):
            logger.warning(
                "generation_config.json of %s sets %s, which transformers considers inconsistent; they are saved unchanged",
                source.name,
                ", ".join(names),
            )
        if added_ids:
            stored = ", ".join(map(str, tokenizer.convert_ids_to_tokens(stored_ids)))
            logger.info(
                "answers end with %s: the exported generation_config.json stops there%s",
                ", ".join(tokenizer.convert_ids_to_tokens(added_ids)),
                f" as well as at {stored}" if stored_ids else "",
            )
        if ends.texts:
            logger.warning(
                "answers end with the text %s, which is not one token, so generation_config.json can't hold it: pass "
                "stop_strings=%r and tokenizer=tokenizer to generate",
                " or ".join(map(repr, ends.texts)),
                list(ends.texts),
            )
    return generation_config, saved_tokenizer
