"""A model's generation settings, as `generation_config.json` has them: read, ended where the training ends a turn, written.

transformers checks such settings on reading, where it refuses some values, and on writing, where it refuses many combinations
(`temperature` without `do_sample`) as soon as anything was changed. Published models have both. A training neither needs these
settings nor may be lost for them: what can't be read is left out and named, everything else is written as the base has it.

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

_READER = logging.getLogger("transformers.generation.configuration_utils")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnds:
    """What ends an answer: token ids, and texts that are several tokens, which no generation config can hold."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


def read_generation_config(folder: Path) -> tuple[GenerationConfig, tuple[str, ...]]:
    """The generation settings in `folder`, from `config.json` where it has no others, as `from_pretrained` reads them.

    Returns:
        The settings, and a sentence about each that transformers refuses, which is left out of them.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    path = folder / GENERATION_CONFIG
    own = path.is_file()
    path = path if own else folder / "config.json"
    raw = _read_json(path) if path.is_file() else {}
    make: Callable[[Mapping[str, Any]], GenerationConfig] = _from_generation_config if own else _from_model_config
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


def _from_generation_config(settings: Mapping[str, Any]) -> GenerationConfig:
    made: Any = GenerationConfig.from_dict(dict(settings))
    return made


def _from_model_config(settings: Mapping[str, Any]) -> GenerationConfig:
    return GenerationConfig.from_model_config(dict(settings))


def _are_tokens(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(token, int) and not isinstance(token, bool) for token in listed)


def _refused(raw: Mapping[str, Any], make: Callable[[Mapping[str, Any]], GenerationConfig]) -> dict[str, str]:
    """The settings without which transformers takes the others, and why: one if that suffices, else in the file's order."""
    reason = _complaint(raw, make)
    if reason is None:
        return {}
    for name in raw:
        if _complaint({other: value for other, value in raw.items() if other != name}, make) is None:
            return {name: reason}
    kept, refused = {}, {}
    for name, value in raw.items():
        why = _complaint({**kept, name: value}, make)
        if why is None:
            kept[name] = value
        else:
            refused[name] = why
    return refused


def _complaint(settings: Mapping[str, Any], make: Callable[[Mapping[str, Any]], GenerationConfig]) -> str | None:
    """Why transformers can't read these settings, or what it reads can't be written; None if both work."""
    try:
        made = make(settings)
        made.validate()
        made.to_json_string(keys_to_pop=["compile_config"])
    except Exception as error:  # noqa: BLE001 - whatever values of any type provoke
        return str(error) or type(error).__name__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings about settings, of which trying them makes many."""
    level = _READER.level
    _READER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _READER.setLevel(level)


def turn_ends(tokenizer: Any, stops: Sequence[str]) -> TurnEnds:
    """What generation has to stop at, so that an answer ends where a template ends it.

    Args:
        stops: texts that end an answer there. The first special token in one is taken, or else its only token.
    """
    special, ids, texts = set(tokenizer.added_tokens_decoder), [], []
    for stop in stops:
        tokens = tokenizer(stop, add_special_tokens=False).input_ids
        marks = [token for token in tokens if token in special] or (tokens if len(tokens) == 1 else [])
        if marks:
            ids.append(marks[0])
        else:
            texts.append(stop)
    return TurnEnds(token_ids=tuple(dict.fromkeys(ids)), texts=tuple(dict.fromkeys(texts)))


def stop_at(generation: GenerationConfig, ends: TurnEnds) -> tuple[int, ...]:
    """Add what ends an answer to the tokens that generation stops at, in place; returns those that it did not have.

    One of several ends may stop generation already. Then the others are left out: gpt-oss ends its thoughts with the token
    that ends an answer in the middle of a conversation, and must go on there.
    """
    had = eos_token_ids(generation)
    new = () if len(ends.token_ids) > 1 and set(had) & set(ends.token_ids) else ends.token_ids
    everything = tuple(dict.fromkeys((*had, *new)))
    if everything:
        generation.eos_token_id = everything[0] if len(everything) == 1 else list(everything)
    return everything[len(had) :]


def eos_token_ids(generation: Any) -> tuple[int, ...]:
    """The tokens that generation stops at, each once."""
    eos = getattr(generation, "eos_token_id", None)
    return tuple(dict.fromkeys(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]))


def inconsistent(generation: GenerationConfig) -> tuple[str, ...]:
    """The settings for which transformers would refuse to save these; where it gives no names, its sentence."""
    try:
        with _quiet():
            generation.validate(strict=True)
    except ValueError as error:
        return tuple(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)) or (str(error),)
    return ()


def write_generation_config(generation: GenerationConfig, folder: Path) -> None:
    """Write the settings as they are, where transformers' own function refuses what it calls inconsistent."""
    generation.to_json_file(folder / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])
