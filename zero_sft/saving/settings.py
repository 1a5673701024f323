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
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.checkpoint.folder_kind import BASE_CONFIG
from zero_sft.conversion.quantized import config_parts
from zero_sft.errors import ExportError, ZeroSftError
from zero_sft.generation_config import GENERATION_CONFIG, write_generation_config
from zero_sft.rope import max_context_tokens, text_config
from zero_sft.saving.older_readers import older_tokenizer_config, with_older_keys
from zero_sft.saving.placing import TOKENIZER_FILES, TOKENIZER_FOLDERS
from zero_sft.tokenizer.fingerprint import encodings
from zero_sft.tokenizer.serialize import base_config
from zero_sft.transformers_internals import internal

logger = logging.getLogger(__name__)

_UNSTATED = 10**20
"""transformers gives tokenizers that state no length a length above this."""


def write_settings(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write config, generation config, tokenizer and, for a model with custom code, this code to the folder. Rank 0.

    Raises:
        ExportError: one of them can't be saved.
    """
    with _explained(f"the code of {type(model).__name__}"):
        if type(model).__module__.startswith("transformers_modules."):
            internal("custom_object_save")(model, folder)
    generation_config = getattr(model, "generation_config", None) if model.can_generate() else None
    _write(folder, model.config, generation_config, tokenizer, model)
    _copy_processor(folder, model.config)


def write_adapter_settings(
    folder: Path, adapter: Any, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write an adapter's config, its base model's config and the tokenizer to the folder. Rank 0.

    Args:
        adapter: PEFT's config, as it is saved.
        config: the base model's.

    Raises:
        ExportError: one of them can't be saved.
    """
    with _explained("the adapter's config"):
        adapter.save_pretrained(folder)
    with _explained("the base model's config"):
        _write_json(folder / BASE_CONFIG, json.loads(_exported(config).to_json_string(use_diff=False)))
    if tokenizer is not None:
        with _explained("the tokenizer"):
            _write_tokenizer(folder, tokenizer, config)


def _exported(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a config without what is set for training alone."""
    copied = copy.deepcopy(config)
    for part in (copied, text_config(copied)):
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True  # off only while training, as in FastChat
    return copied


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


def rehearse_settings(config: PreTrainedConfig, generation_config: GenerationConfig, tokenizer: Any) -> None:
    """Rehearse `write_settings` in a temporary folder, and warn if the tokenizer read back from it encodes otherwise. Rank 0.

    Raises:
        ExportError: one of them can't be saved.
    """
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as folder:
        _write(Path(folder), config, generation_config, tokenizer)
        warning = changed_encoding(Path(folder), tokenizer)
        if warning:
            logger.warning(warning)


def _write(
    folder: Path,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write copies that are consistent with each other and, if there is a model, with its class and weights."""
    config, generation_config = _exported(config), copy.deepcopy(generation_config)
    parts = (config, text_config(config))
    tied = None if model is None else heads_are_tied(model)
    for part in parts:
        if tied is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tied
    if model is not None:
        config.architectures = [type(model).__name__]
        weights_dtype = next((param.dtype for param in model.parameters() if param.is_floating_point()), None)
        for part in config_parts(config) if weights_dtype is not None else ():
            part.dtype = weights_dtype
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        for part in (*parts, *([] if generation_config is None else [generation_config])):
            part.pad_token_id = tokenizer.pad_token_id
    with _explained("the model's config"):
        config.save_pretrained(folder)
        path = folder / "config.json"
        _write_json(path, with_older_keys(json.loads(path.read_text(encoding="utf-8"))))
    if generation_config is not None:
        with _explained("the generation settings"):
            write_generation_config(generation_config, folder)
    if tokenizer is not None:
        with _explained("the tokenizer"):
            _write_tokenizer(folder, tokenizer, config)


@contextlib.contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Turn an error of transformers into an ExportError that names the object which can't be saved."""
    try:
        yield
    except (OSError, ZeroSftError):
        raise
    except Exception as error:  # each class of settings raises other types
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ExportError(
            f"{subject} can't be saved: {reason}. Correct it in the model's files, or where your code has set it.",
            code="export.settings_unsavable",
        ) from error


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
    readable, stated = max_context_tokens(text_config(config)), base.get("model_max_length")
    lengths = [length for length in (stated, readable) if isinstance(length, int) and length < _UNSTATED]
    saved["model_max_length"] = max(lengths) if lengths else stated or saved["model_max_length"]
    if "legacy" in base:
        saved.setdefault("legacy", base["legacy"])
    _write_json(path, older_tokenizer_config(saved, base, _adds_special_tokens(tokenizer), tokenizer.chat_template))


def _adds_special_tokens(tokenizer: Any) -> dict[str, bool]:
    ids = tokenizer("a").input_ids
    ends = {"add_bos_token": (tokenizer.bos_token_id, ids[:1]), "add_eos_token": (tokenizer.eos_token_id, ids[-1:])}
    return {name: token is not None and end_ids == [token] for name, (token, end_ids) in ends.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def changed_encoding(folder: Path, tokenizer: Any) -> str | None:
    """Describe the first text that plain transformers encodes with the tokenizer in `folder` to other ids than `tokenizer`.

    A round trip through transformers loses settings of some tokenizers, such as `legacy` of Llama's, and then silently encodes
    the same text to other ids. `_write_tokenizer` restores the settings that it knows; this check finds all others. Left out:
    tokenizers with custom code, which is not run again here.
    """
    if type(tokenizer).__module__.startswith("transformers_modules."):
        return None
    try:
        reopened = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception
        return f"plain transformers can't open the exported tokenizer: {str(error).strip() or type(error).__name__}."
    trained_encodings, reopened_encodings = encodings(tokenizer), encodings(reopened)
    for text, ids in trained_encodings.items():
        reopened_ids = reopened_encodings.get(text)
        if ids != reopened_ids:
            return (
                f"plain transformers encodes {text} with the exported tokenizer to other ids ({_around(reopened_ids, ids)}) "
                f"than this run trains on ({_around(ids, reopened_ids)}). Open the export with the base model's tokenizer "
                "files, or report this."
            )
    return None


def _around(ids: Any, others: Any) -> str:
    """Format the ids from just before the first difference."""
    ids, others = list(ids or ()), list(others or ())
    first = next((index for index, (id_, other) in enumerate(zip(ids, others, strict=False)) if id_ != other), 0)
    return ", ".join(map(str, ids[max(0, first - 1) : first + 3])) + ", ..."


def settings_in(folder: Path) -> dict[str, bytes]:
    """Return the files of config, tokenizer, processor and custom code in a model's folder or a checkpoint, by path. Rank 0."""
    names = {"config.json", GENERATION_CONFIG, *TOKENIZER_FILES, *_PROCESSOR_FILES}
    of_deepspeed = {"zero_to_fp32.py", "zero_to_torch.py"}
    paths = [path for path in folder.iterdir() if path.name in names or path.suffix in (".py", ".tiktoken")]
    paths += [path for name in TOKENIZER_FOLDERS for path in (folder / name).glob("*")]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file() and path.name not in of_deepspeed
    }
