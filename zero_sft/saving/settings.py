"""The files of an export next to its weights: config, generation config and tokenizer.

They are written at a run's end, and for trial before its weights are read (`rehearse_settings`), so that what can't be saved is
an error then. Everything here runs on rank 0 and does not communicate.
"""

import contextlib
import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.errors import ExportError, ZeroSftError
from zero_sft.generation_config import write_generation_config
from zero_sft.rope import readable_tokens, text_config
from zero_sft.saving.older_readers import older_tokenizer_config, with_older_keys
from zero_sft.saving.reopened import changed_encoding
from zero_sft.tokenizer.base_config import base_config
from zero_sft.transformers_internals import internal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is known of a model next to its weights. `tied`: do its input and output embeddings share their weights?"""

    config: PreTrainedConfig
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    architecture: str | None = None
    tied: bool | None = None

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> "Settings":
        """Those of a model as it is now."""
        generation = getattr(model, "generation_config", None) if model.can_generate() else None
        return Settings(
            config=model.config,
            generation=generation,
            tokenizer=tokenizer,
            architecture=type(model).__name__,
            tied=heads_are_tied(model),
        )


def write_settings(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write config, generation config and tokenizer to the folder, and the code of a model that brings its own. Rank 0.

    Raises:
        ExportError: something in them can't be saved.
    """
    with _explained(f"the code of {type(model).__name__}"):
        if type(model).__module__.startswith("transformers_modules."):
            internal("custom_object_save")(model, folder)
    _write(folder, Settings.of(model, tokenizer))
    _copy_processor(folder, model.config)


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MEDIA = ("vision_config", "audio_config")


def _copy_processor(folder: Path, config: PreTrainedConfig) -> None:
    """The base's files about images and sound, which no training changes, for a model that takes some."""
    if not any(getattr(config, name, None) for name in _MEDIA):
        return
    found = [path for name in _PROCESSOR_FILES if (path := Path(config.name_or_path) / name).is_file()]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not found:
        logger.warning(
            "%s has no preprocessor_config.json or processor_config.json; whoever gives the exported model images or sound "
            "needs the original's next to it", config.name_or_path,
        )  # fmt: skip


def rehearse_settings(
    config: PreTrainedConfig, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None, chat_template: Any
) -> None:
    """Write what an export would hold next to the weights to a temporary folder, with this chat template. Rank 0.

    A tokenizer that reads back as another is named in a warning.

    Raises:
        ExportError: something in it can't be saved.
    """
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as folder, _chat_template(tokenizer, chat_template):
        _write(Path(folder), Settings(config=config, generation=generation, tokenizer=tokenizer))
        changed = None if tokenizer is None else changed_encoding(Path(folder), tokenizer)
        if changed:
            logger.warning(changed)


@contextlib.contextmanager
def _chat_template(tokenizer: Any, chat_template: Any) -> Iterator[None]:
    if tokenizer is None:
        yield
        return
    own, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        yield
    finally:
        tokenizer.chat_template = own


def _write(folder: Path, settings: Settings) -> None:
    config, generation = _completed(settings)
    with _explained("the model's config"):
        config.save_pretrained(folder)
        path = folder / "config.json"
        _write_json(path, with_older_keys(json.loads(path.read_text(encoding="utf-8"))))
    if generation is not None:
        with _explained("the generation settings"):
            write_generation_config(generation, folder)
    if settings.tokenizer is not None:
        with _explained("the tokenizer"):
            _write_tokenizer(folder, settings.tokenizer, config)


class _explained:
    """Turn an error of transformers' into an ExportError that says what can't be saved."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError | ZeroSftError):
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ExportError(
                f"{self._what} can't be saved: {reason}. Put it right in the model's files, or in what your code has set.",
                code="export.settings_unsavable",
            ) from error


def _completed(settings: Settings) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Copies of the config and the generation config that say the same as each other and as the weights."""
    config, generation = copy.deepcopy(settings.config), copy.deepcopy(settings.generation)
    parts = (config, text_config(config))
    for part in parts:
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True  # off for training alone, as in FastChat
        if settings.tied is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = settings.tied
    if settings.architecture is not None:
        config.architectures = [settings.architecture]
    if settings.tokenizer is not None and settings.tokenizer.pad_token_id is not None:
        for part in (*parts, *([] if generation is None else [generation])):
            part.pad_token_id = settings.tokenizer.pad_token_id
    return config, generation


def heads_are_tied(model: PreTrainedModel) -> bool | None:
    """Do input and output embeddings share their weights? None for a model without either."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    one, other = getattr(inputs, "weight", None), getattr(outputs, "weight", None)
    return None if one is None or other is None else one is other


def _write_tokenizer(folder: Path, tokenizer: Any, config: PreTrainedConfig) -> None:
    """The tokenizer with the base's length, not the run's; in a form that transformers 4 opens as well."""
    base = base_config(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    readable, stated = readable_tokens(text_config(config)), base.get("model_max_length")
    lengths = [length for length in (stated, readable) if isinstance(length, int) and length < _UNSTATED]
    saved["model_max_length"] = max(lengths) if lengths else stated or saved["model_max_length"]
    if "legacy" in base:
        saved.setdefault("legacy", base["legacy"])
    _write_json(path, older_tokenizer_config(saved, base, _adds(tokenizer), tokenizer.chat_template))


def _adds(tokenizer: Any) -> dict[str, bool]:
    ids = tokenizer("a").input_ids
    ends = {"add_bos_token": (tokenizer.bos_token_id, ids[:1]), "add_eos_token": (tokenizer.eos_token_id, ids[-1:])}
    return {name: token is not None and found == [token] for name, (token, found) in ends.items()}


_UNSTATED = 10**20
"""Lengths beyond this are transformers' way to say that a tokenizer states none."""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
