"""Parse one object of a file into a sample, in each of the usual formats of conversations and texts.

    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}
    prompt_completion   {"prompt": ..., "completion": ...}, both text, or both lists of messages
    text                {"text": ...}

- An object with the keys of two formats is refused, unless the user names the format, one of the values is empty, or the second
  is a `text` that contains all texts of the first.
- An Alpaca sample is one question (the instruction with the input below it) and one answer, after an optional `history` of such
  pairs.
- The first three formats may have a `system` text next to the turns.
- Plain text (`text`, and prompts and completions that are strings) is used as it is, without a template.
- For other keys, see `keys` and `turns`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from zero_sft.data.samples.conversation import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Conversation,
    PromptCompletion,
    Sample,
    Turn,
    dialogue,
)
from zero_sft.data.samples.key_meanings import is_empty
from zero_sft.data.samples.keys import check_keys, contains_texts
from zero_sft.data.samples.turns import parse_turns, require_unicode
from zero_sft.errors import DataError
from zero_sft.printable import excerpt, first_of

DataFormat = Literal["sharegpt", "messages", "alpaca", "prompt_completion", "text"]
"""The values of `--data_format`, the keys of `SAMPLE_FORMATS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSample:
    """A sample, the number of its dropped turns by reason (see `dialogue`), and its keys that were not read."""

    sample: Sample
    dropped_turns: Counter[str] = field(default_factory=Counter)
    unread_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFormat:
    """One way to write a sample: its required keys, an example for messages, and the function that parses it."""

    keys: tuple[str, ...]
    example: str
    parse: Callable[[Mapping[str, Any], str], ParsedSample]
    optional_keys: tuple[str, ...] = ()


_SHAREGPT_ROLES = {
    "human": USER, "user": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT,
    "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL,
}  # fmt: skip
_MESSAGE_ROLES = {role: role for role in (USER, ASSISTANT, SYSTEM, TOOL)}


def read_sample(sample: Any, where: str, data_format: str | None = None) -> tuple[str, ParsedSample]:
    """Parse an object of a file, in a format that None detects by the object's keys; return the format's name and the sample.

    Raises:
        DataError: the object has no known format, or does not follow its format.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: expected {EXPECTED}; got {type(sample).__name__}.", code="data.sample_not_an_object")
    names = [data_format] if data_format else list(SAMPLE_FORMATS)
    matching = [name for name in names if _has_keys(sample, name)]
    full = [name for name in matching if not any(is_empty(sample[key]) for key in SAMPLE_FORMATS[name].keys)]
    if len(full) == 2 and full[1] == "text" and isinstance(sample["text"], str):
        parsed = SAMPLE_FORMATS[full[0]].parse(sample, where)
        full = full[:1] if contains_texts(sample["text"], _texts_of(parsed.sample)) else full
    if len(full) > 1:
        raise DataError(
            f"{where}: the keys of {len(full)} formats, {_keys_of(full[0])} of {full[0]} and {_keys_of(full[1])} of {full[1]}. "
            f"Choose the one to train on with --data_format {full[0]} or {full[1]}, or remove the other keys.",
            code="data.several_formats",
        )
    if matching:
        name = (full or matching)[0]
        sample_format = SAMPLE_FORMATS[name]
        read = ("id", *sample_format.keys, *sample_format.optional_keys)
        check = partial(check_keys, sample, where, format_name=name, read=read, is_chosen=data_format is not None)
        check(texts=None)  # before parsing, so that a sample with `tools` is refused for this key and not for one of its turns
        parsed = sample_format.parse(sample, where)
        unread_keys = check(texts=_texts_of(parsed.sample))
        return name, replace(parsed, unread_keys=(*parsed.unread_keys, *unread_keys)) if unread_keys else parsed
    keys = first_of((f"{excerpt(repr(key))}{' (null)' * (value is None)}" for key, value in sample.items()), 8)
    got = f"got the keys {keys}" if keys else "got an object without keys"
    expected = f"expected {EXPECTED}"
    if data_format:
        expected = f"--data_format {data_format}: expected {SAMPLE_FORMATS[data_format].example}"
    raise DataError(f"{where}: {expected}; {got}.{_hint(sample, data_format)}", code="data.unknown_format")


def _hint(sample: Mapping[str, Any], data_format: str | None) -> str:
    """Suggest a remedy for an object that wraps samples, has turns under another key, or a pair of answers to compare."""
    for key, value in sample.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and any(_has_keys(first, name) for name in SAMPLE_FORMATS):
            return f" The samples seem to be in `{excerpt(key)}`: write only that list."
        for name, expected, turn_keys in _TURN_KEYS:
            if isinstance(first, Mapping) and all(turn_key in first for turn_key in turn_keys) and data_format in (None, name):
                return f" The turns seem to be in `{excerpt(key)}`: rename that key to `{expected}`."
    if all(sample.get(key) is not None for key in ("chosen", "rejected")):
        return " Answers to compare (`chosen`, `rejected`) are not read: write the chosen one as `completion`."
    return ""


_TURN_KEYS = (("sharegpt", "conversations", ("from", "value")), ("messages", "messages", ("role", "content")))
"""Formats with turns: the name, the key of the turns, and the keys of a turn."""


def _has_keys(sample: Mapping[str, Any], format_name: str) -> bool:
    return all(sample.get(key) is not None for key in SAMPLE_FORMATS[format_name].keys)


def _keys_of(format_name: str) -> str:
    return " and ".join(f"`{key}`" for key in SAMPLE_FORMATS[format_name].keys)


def _texts_of(sample: Sample) -> list[str]:
    return [sample.prompt, sample.completion] if isinstance(sample, PromptCompletion) else [turn.text for turn in sample.turns]


def _parse_sharegpt(sample: Mapping[str, Any], where: str) -> ParsedSample:
    turns, notes = parse_turns(sample["conversations"], "conversations", ("from", "value"), _SHAREGPT_ROLES, where)
    return _conversation(_with_system(sample, turns, where), where, notes, {USER: "human", ASSISTANT: "gpt"})


def _parse_messages(sample: Mapping[str, Any], where: str) -> ParsedSample:
    turns, notes = _parse_messages_of(sample, "messages", where)
    return _conversation(_with_system(sample, turns, where), where, notes)


def _parse_alpaca(sample: Mapping[str, Any], where: str) -> ParsedSample:
    texts = {key: _text_or_empty(sample, key, where) for key in ("instruction", "input", "output")}
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    pairs = (*_history(sample, where), (question, texts["output"]))
    turns = [Turn(role=role, text=text) for pair in pairs for role, text in zip((USER, ASSISTANT), pair, strict=True)]
    return _conversation(_with_system(sample, turns, where), where)


def _history(sample: Mapping[str, Any], where: str) -> list:
    """Return the pairs of question and answer before the instruction."""
    pairs = sample.get("history")
    if is_empty(pairs):
        return []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise DataError(
            f"{where}: `history` must be a list of pairs of a question and an answer; got {excerpt(pairs)}.",
            code="data.bad_history",
        )
    for number, pair in enumerate(pairs, start=1):
        for text, part in zip(pair, ("first text, the question,", "second text, the answer,"), strict=True):
            if not isinstance(text, str):
                fault = "is missing (null)" if text is None else f"must be a text; got {excerpt(text)}"
                raise DataError(
                    f'{where}, pair {number} of `history`: its {part} {fault}. Write a text, "" for none, or remove the pair.',
                    code="data.bad_history",
                )
            require_unicode(text, where)
    return pairs


def _with_system(sample: Mapping[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """Put the sample's `system` text, if it has one, before the turns."""
    text = _text_or_empty(sample, "system", where)
    if text and turns and turns[0].role == SYSTEM:
        raise DataError(
            f"{where}: two system texts, one as the first turn and one as `system`. Remove one.",
            code="data.second_system_text",
        )
    return [Turn(role=SYSTEM, text=text), *turns] if text else turns


def _parse_prompt_completion(sample: Mapping[str, Any], where: str) -> ParsedSample:
    keys = ("prompt", "completion")
    if all(isinstance(sample[key], list) for key in keys):
        (prompt_turns, prompt_notes), (turns, notes) = (_parse_messages_of(sample, key, where) for key in keys)
        prompt_turns = [replace(turn, left_out_of_loss=True) for turn in prompt_turns]
        return _conversation([*prompt_turns, *turns], where, (*prompt_notes, *notes))
    message_keys = [key for key in keys if isinstance(sample[key], list | Mapping)]
    if message_keys and any(isinstance(sample[key], str) for key in keys):
        raise DataError(
            f"{where}: `{message_keys[0]}` holds messages, but the other of `prompt` and `completion` is a text. Make both "
            'lists of messages, [{"role": ..., "content": ...}], or both texts.',
            code="data.prompt_and_completion_differ",
        )
    prompt, completion = (_text(sample[key], key, where) for key in keys)
    return ParsedSample(sample=PromptCompletion(prompt=prompt, completion=completion, where=where))


def _parse_text(sample: Mapping[str, Any], where: str) -> ParsedSample:
    return ParsedSample(sample=PromptCompletion(prompt="", completion=_text(sample["text"], "text", where), where=where))


SAMPLE_FORMATS = {
    "sharegpt": SampleFormat(
        keys=("conversations",),
        parse=_parse_sharegpt,
        example='{"conversations": [{"from": "human", "value": ...}, ...]}',
        optional_keys=("system",),
    ),
    "messages": SampleFormat(
        keys=("messages",),
        parse=_parse_messages,
        example='{"messages": [{"role": "user", "content": ...}, ...]}',
        optional_keys=("system",),
    ),
    "alpaca": SampleFormat(
        keys=("instruction", "output"),
        parse=_parse_alpaca,
        example='{"instruction": ..., "input": ..., "output": ...}',
        optional_keys=("input", "history", "system"),
    ),
    "prompt_completion": SampleFormat(
        keys=("prompt", "completion"), parse=_parse_prompt_completion, example='{"prompt": ..., "completion": ...}'
    ),
    "text": SampleFormat(keys=("text",), parse=_parse_text, example='{"text": ...}'),
}
*_EXAMPLES, _LAST_EXAMPLE = (sample_format.example for sample_format in SAMPLE_FORMATS.values())
EXPECTED = f"{', '.join(_EXAMPLES)} or {_LAST_EXAMPLE}"


def _conversation(
    turns: list[Turn], where: str, unread_keys: tuple[str, ...] = (), words: Mapping[str, str] | None = None
) -> ParsedSample:
    kept, dropped = dialogue(turns, where, words or {})
    return ParsedSample(sample=Conversation(turns=kept, where=where), dropped_turns=dropped, unread_keys=unread_keys)


def _parse_messages_of(sample: Mapping[str, Any], key: str, where: str) -> tuple[list[Turn], tuple[str, ...]]:
    return parse_turns(sample[key], key, ("role", "content"), _MESSAGE_ROLES, where)


def _text_or_empty(sample: Mapping[str, Any], key: str, where: str) -> str:
    return "" if sample.get(key) is None else _text(sample[key], key, where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be a text; got {excerpt(value)}.", code="data.not_a_text")
    require_unicode(value, where)
    return value
