"""Write the files of an export next to its weights: config, generation config and tokenizer.

They are written at the end of a run, and to a temporary folder before its weights are read (`rehearse_settings`), so that
settings which can't be saved raise an error early. Everything here runs on rank 0 and does not communicate.
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
from zero_sft.tokenizer.serialize import base_config
from zero_sft.transformers_internals import internal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A model's settings next to its weights.

    Attributes:
        architecture: the name of the model's class, if the model exists.
        tied: whether input and output embeddings share their weights; None if that is not known.
    """

    config: PreTrainedConfig
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    architecture: str | None = None
    tied: bool | None = None

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> "Settings":
        """Return the settings of a model as it is now."""
        generation = getattr(model, "generation_config", None) if model.can_generate() else None
        return Settings(
            config=model.config,
            generation=generation,
            tokenizer=tokenizer,
            architecture=type(model).__name__,
            tied=heads_are_tied(model),
        )


def write_settings(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write config, generation config, tokenizer and, for a model with custom code, this code to the folder. Rank 0.

    Raises:
        ExportError: one of them can't be saved.
    """
    with _explained(f"the code of {type(model).__name__}"):
        if type(model).__module__.startswith("transformers_modules."):
            internal("custom_object_save")(model, folder)
    _write(folder, Settings.of(model, tokenizer))
    _copy_processor(folder, model.config)


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MEDIA = ("vision_config", "audio_config")


def _copy_processor(folder: Path, config: PreTrainedConfig) -> None:
    """Copy the base model's files for images and sound, which training does not change, for a model that takes these."""
    if not any(getattr(config, name, None) for name in _MEDIA):
        return
    paths = [path for name in _PROCESSOR_FILES if (path := Path(config.name_or_path or "") / name).is_file()]
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    if not paths:
        logger.warning(
            "%s has no preprocessor_config.json or processor_config.json; whoever gives the exported model images or sound "
            "needs the original's next to it", config.name_or_path,
        )  # fmt: skip


def rehearse_settings(
    config: PreTrainedConfig, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None, chat_template: Any
) -> None:
    """Write an export's settings, with this chat template, to a temporary folder for a test. Rank 0.

    Log a warning if the tokenizer encodes in another way after it is read back.

    Raises:
        ExportError: one of them can't be saved.
    """
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as folder, _with_chat_template(tokenizer, chat_template):
        _write(Path(folder), Settings(config=config, generation=generation, tokenizer=tokenizer))
        warning = None if tokenizer is None else changed_encoding(Path(folder), tokenizer)
        if warning:
            logger.warning(warning)


@contextlib.contextmanager
def _with_chat_template(tokenizer: Any, chat_template: Any) -> Iterator[None]:
    if tokenizer is None:
        yield
        return
    own_template, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        yield
    finally:
        tokenizer.chat_template = own_template


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
    """Turn an error of transformers into an ExportError that names the object which can't be saved."""

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError | ZeroSftError):
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ExportError(
                f"{self._subject} can't be saved: {reason}. Correct it in the model's files, or where your code has set it.",
                code="export.settings_unsavable",
            ) from error


def _completed(settings: Settings) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Copy config and generation config, and make them consistent with each other and with the weights."""
    config, generation = copy.deepcopy(settings.config), copy.deepcopy(settings.generation)
    parts = (config, text_config(config))
    for part in parts:
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True  # off only while training, as in FastChat
        if settings.tied is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = settings.tied
    if settings.architecture is not None:
        config.architectures = [settings.architecture]
    if settings.tokenizer is not None and settings.tokenizer.pad_token_id is not None:
        for part in (*parts, *([] if generation is None else [generation])):
            part.pad_token_id = settings.tokenizer.pad_token_id
    return config, generation


def heads_are_tied(model: PreTrainedModel) -> bool | None:
    """Return whether input and output embeddings share their weights; None for a model that lacks one of them."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    input_weight, output_weight = getattr(inputs, "weight", None), getattr(outputs, "weight", None)
    return None if input_weight is None or output_weight is None else input_weight is output_weight


def _write_tokenizer(folder: Path, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Write the tokenizer with the base model's length, not the run's, in a form that transformers 4 can open."""
    base = base_config(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    readable, stated = readable_tokens(text_config(config)), base.get("model_max_length")
    lengths = [length for length in (stated, readable) if isinstance(length, int) and length < _UNSTATED]
    saved["model_max_length"] = max(lengths) if lengths else stated or saved["model_max_length"]
    if "legacy" in base:
        saved.setdefault("legacy", base["legacy"])
    _write_json(path, older_tokenizer_config(saved, base, _adds_special_tokens(tokenizer), tokenizer.chat_template))


def _adds_special_tokens(tokenizer: Any) -> dict[str, bool]:
    ids = tokenizer("a").input_ids
    ends = {"add_bos_token": (tokenizer.bos_token_id, ids[:1]), "add_eos_token": (tokenizer.eos_token_id, ids[-1:])}
    return {name: token is not None and end_ids == [token] for name, (token, end_ids) in ends.items()}


_UNSTATED = 10**20
"""transformers gives tokenizers that state no length a length above this."""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
