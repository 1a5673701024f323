"""Read a model's generation settings, add the end of a turn to the stop tokens, and write them.

transformers refuses some values when it reads `generation_config.json`. When it writes changed settings, it refuses many
combinations (`temperature` without `do_sample`). Published models have both. Training does not need these settings and must not
fail because of them: settings that can't be read are left out and named, all others are written as the base model has them.

Nothing here communicates.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from zero_sft.errors import ConfigError
from zero_sft.transformers_internals import mark_as_read

GENERATION_CONFIG = "generation_config.json"

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

_Make = Callable[[dict[str, Any]], Any]
"""Make a GenerationConfig from the settings in a file, which it may change."""

_READER = logging.getLogger("transformers.generation.configuration_utils")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnds:
    """The ends of an answer: token ids, and texts of several tokens, which a generation config can't hold."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


def read_generation_config(folder: Path) -> tuple[GenerationConfig, tuple[str, ...]]:
    """Read the generation settings in `folder` as `from_pretrained` does: `generation_config.json`, else `config.json`.

    Returns:
        The settings, and a sentence about each setting that was left out because transformers refuses it.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    path = folder / GENERATION_CONFIG
    has_file = path.is_file()
    path = path if has_file else folder / "config.json"
    raw = _read_json(path) if path.is_file() else {}
    make: _Make = GenerationConfig.from_dict if has_file else GenerationConfig.from_model_config
    with _quiet():
        refused = {name: f"expected token ids, got {raw[name]!r}" for name in _TOKENS if not _are_tokens(raw.get(name))}
        kept = {name: value for name, value in raw.items() if name not in refused}
        refused |= _refused(kept, make)
        generation = make({name: value for name, value in raw.items() if name not in refused})
    mark_as_read(generation)
    return generation, tuple(
        f"{path}: transformers refuses {name} = {raw[name]!r} ({' '.join(reason.split()).rstrip('.')}); it is left out, here "
        "and in what is saved"
        for name, reason in refused.items()
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{path} can't be read as JSON: {error}. Copy the file again, or remove it.", code="generation_config.not_json"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected a JSON object, got {raw!r:.80}. Copy the file again, or remove it.",
            code="generation_config.not_an_object",
        )
    return raw


def _are_tokens(value: Any) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)


def _refused(raw: Mapping[str, Any], make: _Make) -> dict[str, str]:
    """Find settings that must be left out for transformers to accept the others, with reasons: one setting if that suffices."""
    reason = _complaint(raw, make)
    if reason is None:
        return {}
    for name in raw:
        if _complaint({other: value for other, value in raw.items() if other != name}, make) is None:
            return {name: reason}
    kept, refused = {}, {}
    for name, value in raw.items():
        reason = _complaint({**kept, name: value}, make)
        if reason is None:
            kept[name] = value
        else:
            refused[name] = reason
    return refused


def _complaint(settings: Mapping[str, Any], make: _Make) -> str | None:
    """Say why transformers can't read these settings or write them again; None if both work."""
    try:
        generation = make(dict(settings))
        generation.validate()
        generation.to_json_string(keys_to_pop=["compile_config"])
    except Exception as error:  # noqa: BLE001 - values of any type can raise any error
        return str(error) or type(error).__name__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about settings, since trying settings causes many."""
    level = _READER.level
    _READER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _READER.setLevel(level)


def turn_ends(tokenizer: Any, stops: Sequence[str]) -> TurnEnds:
    """Find the tokens and texts at which generation must stop, so that an answer ends where a template ends it.

    Args:
        stops: the texts with which the template ends an answer. A text counts as its first special token, or as its only token.
    """
    special_ids, ids, texts = set(tokenizer.added_tokens_decoder), [], []
    for stop in stops:
        tokens = tokenizer(stop, add_special_tokens=False).input_ids
        end_tokens = [token for token in tokens if token in special_ids] or (tokens if len(tokens) == 1 else [])
        if end_tokens:
            ids.append(end_tokens[0])
        else:
            texts.append(stop)
    return TurnEnds(token_ids=tuple(dict.fromkeys(ids)), texts=tuple(dict.fromkeys(texts)))


def stop_at(generation: GenerationConfig, ends: TurnEnds) -> tuple[int, ...]:
    """Add the ends of an answer to the stop tokens of `generation`, in place. Return the tokens that were added.

    If one of several ends is a stop token already, nothing is added: gpt-oss ends its thoughts with the token that ends an
    answer in the middle of a conversation, and must continue after its thoughts.
    """
    former = eos_token_ids(generation)
    new = () if len(ends.token_ids) > 1 and set(former) & set(ends.token_ids) else ends.token_ids
    stop_tokens = tuple(dict.fromkeys((*former, *new)))
    if stop_tokens:
        generation.eos_token_id = stop_tokens[0] if len(stop_tokens) == 1 else list(stop_tokens)
    return stop_tokens[len(former) :]


def eos_token_ids(generation: Any) -> tuple[int, ...]:
    """Return the tokens at which generation stops, without duplicates."""
    eos = getattr(generation, "eos_token_id", None)
    return tuple(dict.fromkeys(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]))


def inconsistent_settings(generation: GenerationConfig) -> tuple[str, ...]:
    """List the settings because of which transformers would refuse a save; its message, if that has no names."""
    try:
        with _quiet():
            generation.validate(strict=True)
    except ValueError as error:
        return tuple(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)) or (str(error),)
    return ()


def write_generation_config(generation: GenerationConfig, folder: Path) -> None:
    """Write the settings unchanged; transformers' `save_pretrained` would refuse inconsistent ones. Rank 0."""
    generation.to_json_file(folder / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])
