"""The files of an export next to its weights: config, generation config and tokenizer.

Everything here runs on rank 0 and does not communicate.
"""

import copy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.config import text_config


def write_settings(draft: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write config, generation config and tokenizer to the folder `draft`. Rank 0."""
    config = copy.deepcopy(model.config)
    for part in (config, text_config(config)):
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True  # off for training alone, as in FastChat
    generation = copy.deepcopy(model.generation_config) if model.can_generate() else None
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        for part in (config, text_config(config), *([] if generation is None else [generation])):
            part.pad_token_id = tokenizer.pad_token_id  # what belongs together says the same
    config.save_pretrained(draft)
    if generation is not None:
        generation.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
