"""What an export will hold next to the weights, decided and tried before the weights are read."""

import logging
from typing import Any

from zero_sft.arguments import Parsed
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.templates.choose import Template
from zero_sft.generation_config import eos_token_ids, inconsistent, read_generation_config, stop_at, turn_ends
from zero_sft.hub.source import CONFIG, ModelSource, fetch_files
from zero_sft.saving.settings import rehearse_settings

logger = logging.getLogger("zero_sft.train")


def rehearse_export(parsed: Parsed, config: Any, tokenizer: Any, template: Template, source: ModelSource, world: World) -> Any:
    """The generation settings of the model that the job will export; and proof that its settings can be saved at all.

    Every rank; communicates.

    Raises:
        ExportError, ConfigError: what the export holds next to the weights can't be read or saved.
    """
    folder = fetch_files(source, world, CONFIG)
    with collective_stage(world, "trying to save the settings"):
        generation, _ = read_generation_config(folder)  # the loader warns about what is refused there
        ends, had = turn_ends(tokenizer, template.turn_ends), eos_token_ids(generation)
        added = stop_at(generation, ends)
        if world.is_main:
            rehearse_settings(config, generation, tokenizer, template.jinja(tokenizer))
    if world.is_main:
        if names := inconsistent(generation):
            logger.warning(
                "generation_config.json of %s sets %s, which transformers calls inconsistent; they are saved as they are",
                source.name,
                ", ".join(names),
            )
        if added:
            logger.info(
                "answers end with %s: the exported generation_config.json stops there%s",
                ", ".join(tokenizer.convert_ids_to_tokens(added)),
                f" as well as at {', '.join(map(str, tokenizer.convert_ids_to_tokens(had)))}" if had else "",
            )
        if ends.texts:
            logger.warning(
                "answers end with the text %s, which is not one token, so generation_config.json can't hold it: give generate "
                "stop_strings=%r and tokenizer=tokenizer",
                " or ".join(map(repr, ends.texts)),
                list(ends.texts),
            )
    return generation
