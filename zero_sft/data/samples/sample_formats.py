"""Parse one object of a file into a sample, in each of the usual formats of conversations and texts.

    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}
    prompt_completion   {"prompt": ..., "completion": ...}, both text, or both lists of messages
    text                {"text": ...}
    token_ids           {"input_ids": [...], "labels": [...]}, or a mask instead of the labels, see `token_ids`

- An object with the keys of two formats is refused, unless the user names the format, one of the values is empty, or the second
  is a `text` that contains all texts of the first.
- An Alpaca sample is one question (the instruction with the input below it) and one answer, after an optional `history` of such
  pairs.
- The first three formats may have a `system` text next to the turns. Conversations may have `tools`, see `tools`, and
  `chat_template_kwargs`, an object of variables for the chat template.
- Plain text (`text`, and prompts and completions that are strings) is used as it is, without a template.
- For other keys, see `keys` and `turns`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from zero_sft.data.samples.assemble import (
    CONVERSATION_KEYS,
    DEFAULT_OPTIONS,
    ParsedSample,
    ReadOptions,
    make_conversation,
    text_of,
    text_or_empty,
)
from zero_sft.data.samples.columns import rename_columns
from zero_sft.data.samples.conversation import (
    ASSISTANT,
    USER,
    PromptCompletion,
    Sample,
    TokenIds,
    Turn,
)
from zero_sft.data.samples.key_meanings import is_empty
from zero_sft.data.samples.keys import check_keys, contains_texts
from zero_sft.data.samples.marks import WEIGHT, weight_of_sample
from zero_sft.data.samples.token_ids import MASKS, parse_token_ids
from zero_sft.data.samples.turn import require_unicode
from zero_sft.data.samples.turns import ParsedTurns, parse_turns
from zero_sft.errors import DataError
from zero_sft.printable import excerpt, first_of

DataFormat = Literal["sharegpt", "messages", "alpaca", "prompt_completion", "text", "token_ids"]
"""The values of `--data_format`, the keys of `SAMPLE_FORMATS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFormat:
    """One way to write a sample: its required keys, an example for messages, and the function that parses it."""

    keys: tuple[str, ...]
    example: str
    parse: Callable[[Mapping[str, Any], str, ReadOptions], ParsedSample]
    optional_keys: tuple[str, ...] = ()


def read_sample(sample: Any, where: str, options: ReadOptions = DEFAULT_OPTIONS) -> tuple[str, ParsedSample]:
    """Parse an object of a file, by default in the format that its keys show; return the format's name and the sample.

    Raises:
        DataError: the object has no known format, or does not follow its format.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: expected {EXPECTED}; got {type(sample).__name__}.", code="data.sample_not_an_object")
    sample, data_format = rename_columns(sample, options.columns, where), options.data_format
    names = [data_format] if data_format else list(SAMPLE_FORMATS)
    matching = [name for name in names if _has_keys(sample, name)]
    full = [name for name in matching if not any(is_empty(sample[key]) for key in SAMPLE_FORMATS[name].keys)]
    if len(full) == 2 and full[1] == "text" and isinstance(sample["text"], str):
        parsed = SAMPLE_FORMATS[full[0]].parse(sample, where, options)
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
        read = ("id", WEIGHT, *sample_format.keys, *_optional_keys_of(sample, name))
        check = partial(check_keys, sample, where, format_name=name, read=read, is_chosen=data_format is not None)
        check(texts=None)  # before parsing, so that a sample with `tools` is refused for this key and not for one of its turns
        parsed = sample_format.parse(sample, where, options)
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


def _optional_keys_of(sample: Mapping[str, Any], format_name: str) -> tuple[str, ...]:
    is_plain_text = format_name == "prompt_completion" and not isinstance(sample["completion"], list)
    return () if is_plain_text else SAMPLE_FORMATS[format_name].optional_keys


def _keys_of(format_name: str) -> str:
    return " and ".join(f"`{key}`" for key in SAMPLE_FORMATS[format_name].keys)


def _texts_of(sample: Sample) -> list[str]:
    if isinstance(sample, TokenIds):
        return []
    if isinstance(sample, PromptCompletion):
        return [sample.prompt, sample.completion]
    return [text for turn in sample.turns for text in (turn.text, turn.thoughts)]


def _parse_sharegpt(sample: Mapping[str, Any], where: str, options: ReadOptions) -> ParsedSample:
    turns = _turns(sample, "conversations", where, options, names=("from", "value"))
    return make_conversation(sample, turns, where, options, {USER: "human", ASSISTANT: "gpt"})


def _parse_messages(sample: Mapping[str, Any], where: str, options: ReadOptions) -> ParsedSample:
    return make_conversation(sample, _turns(sample, "messages", where, options), where, options)


def _parse_alpaca(sample: Mapping[str, Any], where: str, options: ReadOptions) -> ParsedSample:
    texts = {key: text_or_empty(sample, key, where) for key in ("instruction", "input", "output")}
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    pairs = (*_history(sample, where), (question, texts["output"]))
    turns = [Turn(role=role, text=text) for pair in pairs for role, text in zip((USER, ASSISTANT), pair, strict=True)]
    return make_conversation(sample, ParsedTurns(turns=turns, numbers=list(range(1, len(turns) + 1))), where, options)


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


def _parse_prompt_completion(sample: Mapping[str, Any], where: str, options: ReadOptions) -> ParsedSample:
    keys = ("prompt", "completion")
    if all(isinstance(sample[key], list) for key in keys):
        prompt, completion = (_turns(sample, key, where, options) for key in keys)
        turns = ParsedTurns(
            turns=[*(replace(turn, weight=0.0) for turn in prompt.turns), *completion.turns],
            numbers=[*prompt.numbers, *completion.numbers],
            unread_keys=(*prompt.unread_keys, *completion.unread_keys),
            changes=prompt.changes + completion.changes,
        )
        return make_conversation(sample, turns, where, options)
    message_keys = [key for key in keys if isinstance(sample[key], list | Mapping)]
    if message_keys and any(isinstance(sample[key], str) for key in keys):
        raise DataError(
            f"{where}: `{message_keys[0]}` holds messages, but the other of `prompt` and `completion` is a text. Make both "
            'lists of messages, [{"role": ..., "content": ...}], or both texts.',
            code="data.prompt_and_completion_differ",
        )
    prompt, completion = (text_of(sample[key], key, where) for key in keys)
    return ParsedSample(
        sample=PromptCompletion(prompt=prompt, completion=completion, where=where, weight=weight_of_sample(sample, where))
    )


def _parse_text(sample: Mapping[str, Any], where: str, _options: ReadOptions) -> ParsedSample:
    text, weight = text_of(sample["text"], "text", where), weight_of_sample(sample, where)
    return ParsedSample(sample=PromptCompletion(prompt="", completion=text, where=where, weight=weight))


def _parse_token_ids(sample: Mapping[str, Any], where: str, _options: ReadOptions) -> ParsedSample:
    return ParsedSample(sample=parse_token_ids(sample, where, weight_of_sample(sample, where)))


SAMPLE_FORMATS = {
    "sharegpt": SampleFormat(
        keys=("conversations",),
        parse=_parse_sharegpt,
        example='{"conversations": [{"from": "human", "value": ...}, ...]}',
        optional_keys=("system", *CONVERSATION_KEYS),
    ),
    "messages": SampleFormat(
        keys=("messages",),
        parse=_parse_messages,
        example='{"messages": [{"role": "user", "content": ...}, ...]}',
        optional_keys=("system", *CONVERSATION_KEYS),
    ),
    "alpaca": SampleFormat(
        keys=("instruction", "output"),
        parse=_parse_alpaca,
        example='{"instruction": ..., "input": ..., "output": ...}',
        optional_keys=("input", "history", "system", *CONVERSATION_KEYS),
    ),
    "prompt_completion": SampleFormat(
        keys=("prompt", "completion"),
        parse=_parse_prompt_completion,
        example='{"prompt": ..., "completion": ...}',
        optional_keys=CONVERSATION_KEYS,
    ),
    "text": SampleFormat(keys=("text",), parse=_parse_text, example='{"text": ...}'),
    "token_ids": SampleFormat(
        keys=("input_ids",),
        parse=_parse_token_ids,
        example='{"input_ids": [...], "labels": [...]}',
        optional_keys=("labels", *MASKS, "attention_mask", "length"),
    ),
}
FORMAT_KEYS = frozenset(key for each in SAMPLE_FORMATS.values() for key in (WEIGHT, *each.keys, *each.optional_keys))
*_EXAMPLES, _LAST_EXAMPLE = (sample_format.example for sample_format in SAMPLE_FORMATS.values())
EXPECTED = f"{', '.join(_EXAMPLES)} or {_LAST_EXAMPLE}"


def _turns(
    sample: Mapping[str, Any], key: str, where: str, options: ReadOptions, names: tuple[str, str] = ("role", "content")
) -> ParsedTurns:
    return parse_turns(sample[key], key, where, names=names, reasoning=options.reasoning, merge=options.merge_turns)
