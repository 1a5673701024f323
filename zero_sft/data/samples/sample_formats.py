"""From one object of a file to a sample: the layouts in which conversations are passed around.

    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}
    prompt_completion   {"prompt": ..., "completion": ...}, both text, or both lists of messages
    text                {"text": ...}

An object with the keys of two layouts is refused, unless a layout was asked for by name, one of the lists is empty, or the
other is a `text` that has all of the first in it. A
turn with `"train": false`, `"loss": false` or `"weight": 0` is not trained on. Alpaca's is one question, the instruction with
the input below it, and one answer, after a `history` of such pairs if there is one. The first three may have a `system` text
next to them. Plain text (`text`, and prompts and completions that are text) is taken as it is, without a template. What
becomes of other keys: see `keys`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
from zero_sft.data.samples.key_meanings import asks_for_nothing
from zero_sft.data.samples.keys import is_trained, renders, require_known_turn, unread_keys
from zero_sft.errors import DataError
from zero_sft.printable import on_one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSample:
    """A sample, how many of its turns were dropped and why (see `dialogue`), and its keys that were not read."""

    sample: Sample
    dropped_turns: Counter[str] = field(default_factory=Counter)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFormat:
    """One way to write a sample: the keys by which it is known, what it looks like, and how it is read.

    `others`: the keys that are read where they are there.
    """

    keys: tuple[str, ...]
    looks: str
    read: Callable[[Mapping[str, Any], str], ParsedSample]
    others: tuple[str, ...] = ()


_SHAREGPT_ROLES = {
    "human": USER, "user": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT,
    "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL,
}  # fmt: skip
_SAME_WORDS: Mapping[str, str] = {}
_SHAREGPT_WORDS = {USER: "human", ASSISTANT: "gpt"}
_MESSAGE_ROLES = {each: each for each in (USER, ASSISTANT, SYSTEM, TOOL)}


def read_sample(sample: Any, where: str, data_format: str | None = None) -> tuple[str, ParsedSample]:
    """The sample that an object of a file is, and the name of its layout.

    Args:
        data_format: the layout that it must have; None takes the one whose keys it has.

    Raises:
        DataError: an object of no layout, or one that is not written as its layout says.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: expected {EXPECTED}; got {type(sample).__name__}.", code="data.sample_not_an_object")
    names = [data_format] if data_format else list(SAMPLE_FORMATS)
    fitting = [name for name in names if _fits(sample, name)]
    full = [name for name in fitting if not any(asks_for_nothing(sample[key]) for key in SAMPLE_FORMATS[name].keys)]
    if len(full) == 2 and full[1] == "text" and isinstance(sample["text"], str):
        found = SAMPLE_FORMATS[full[0]].read(sample, where)
        full = full[:1] if renders(sample["text"], _texts_of(found.sample)) else full
    if len(full) > 1:
        raise DataError(
            f"{where}: the keys of {len(full)} formats, {_keys_of(full[0])} of {full[0]} and {_keys_of(full[1])} of {full[1]}. "
            f"Say which to train on, --data_format {full[0]} or {full[1]}, or remove the others.",
            code="data.several_formats",
        )
    if fitting:
        name = (full or fitting)[0]
        layout = SAMPLE_FORMATS[name]
        read = ("id", *layout.keys, *layout.others)
        unread_keys(sample, where, layout=name, read=read)  # a sample with tools is told of these, not of their turns
        found = layout.read(sample, where)
        texts, chosen = _texts_of(found.sample), data_format is not None
        unread = unread_keys(sample, where, layout=name, read=read, chosen=chosen, texts=texts)
        return name, replace(found, unread=(*found.unread, *unread)) if unread else found
    keys = ", ".join([f"{on_one_line(repr(key))}{' (null)' * (value is None)}" for key, value in sample.items()][:8]) or "none"
    wanted = (
        f"--data_format {data_format}: expected {SAMPLE_FORMATS[data_format].looks}" if data_format else f"expected {EXPECTED}"
    )
    raise DataError(f"{where}: {wanted}; got the keys {keys}.{_hint(sample)}", code="data.unknown_format")


def _hint(sample: Mapping[str, Any]) -> str:
    """For an object that is a list of samples in a wrapping, or answers to compare."""
    for key, value in sample.items():
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], Mapping)
            and any(_fits(value[0], name) for name in SAMPLE_FORMATS)
        ):
            return f" The samples seem to be in `{on_one_line(key)}`: write that list alone."
    if all(sample.get(key) is not None for key in ("chosen", "rejected")):
        return " Answers to compare (`chosen`, `rejected`) are not read: write the chosen one as `completion`."
    return ""


def _fits(sample: Mapping[str, Any], layout: str) -> bool:
    return all(sample.get(key) is not None for key in SAMPLE_FORMATS[layout].keys)


def _keys_of(layout: str) -> str:
    return " and ".join(f"`{key}`" for key in SAMPLE_FORMATS[layout].keys)


def _texts_of(sample: Sample) -> list[str]:
    return [sample.prompt, sample.completion] if isinstance(sample, PromptCompletion) else [turn.text for turn in sample.turns]


def _sharegpt(sample: Mapping[str, Any], where: str) -> ParsedSample:
    turns, notes = _turns(sample["conversations"], "conversations", ("from", "value"), _SHAREGPT_ROLES, where)
    return _conversation(_with_system(sample, turns, where), where, _SHAREGPT_WORDS, notes)


def _messages(sample: Mapping[str, Any], where: str) -> ParsedSample:
    turns, notes = _turns(sample["messages"], "messages", ("role", "content"), _MESSAGE_ROLES, where)
    return _conversation(_with_system(sample, turns, where), where, unread=notes)


def _alpaca(sample: Mapping[str, Any], where: str) -> ParsedSample:
    texts = {key: _text_or_nothing(sample, key, where) for key in ("instruction", "input", "output")}
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    turns = []
    for pair in (*_history(sample, where), (question, texts["output"])):
        turns += [
            Turn(role=role, text=_text(text, "history", where)) for role, text in zip((USER, ASSISTANT), pair, strict=True)
        ]
    return _conversation(_with_system(sample, turns, where), where)


def _history(sample: Mapping[str, Any], where: str) -> list:
    """The questions and answers before an instruction."""
    pairs = sample.get("history")
    if asks_for_nothing(pairs):
        return []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise DataError(
            f"{where}: `history` must be a list of pairs of a question and an answer; got {on_one_line(pairs)}.",
            code="data.bad_history",
        )
    for number, pair in enumerate(pairs, start=1):
        for text, which in zip(pair, ("first text, the question,", "second text, the answer,"), strict=True):
            if not isinstance(text, str):
                found = "is missing (null)" if text is None else f"must be a text; got {on_one_line(text)}"
                raise DataError(
                    f'{where}, pair {number} of `history`: its {which} {found}. Write a text, "" for none, or remove the pair.',
                    code="data.bad_history",
                )
    return pairs


def _with_system(sample: Mapping[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """The turns, after the `system` text that stands beside them if there is one."""
    text = _text_or_nothing(sample, "system", where)
    if text and turns and turns[0].role == SYSTEM:
        raise DataError(
            f"{where}: a system text among the turns and one beside them, `system`. Remove one.", code="data.second_system_text"
        )
    return [Turn(role=SYSTEM, text=text), *turns] if text else turns


def _prompt_completion(sample: Mapping[str, Any], where: str) -> ParsedSample:
    prompt, completion = sample["prompt"], sample["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        (asked, notes), (answered, others) = (
            _turns(sample[key], key, ("role", "content"), _MESSAGE_ROLES, where) for key in ("prompt", "completion")
        )
        turns = [*(replace(turn, trained=False) for turn in asked), *answered]
        return _conversation(turns, where, unread=tuple(dict.fromkeys((*notes, *others))))
    lists = [key for key in ("prompt", "completion") if isinstance(sample[key], list | Mapping)]
    if lists and isinstance(sample["completion" if lists == ["prompt"] else "prompt"], str):
        raise DataError(
            f"{where}: `{lists[0]}` holds messages, and the other of `prompt` and `completion` is a text. Make both lists of "
            'messages, [{"role": ..., "content": ...}], or both texts.',
            code="data.prompt_and_completion_differ",
        )
    texts = (_text(prompt, "prompt", where), _text(completion, "completion", where))
    return ParsedSample(sample=PromptCompletion(prompt=texts[0], completion=texts[1], where=where))


def _plain(sample: Mapping[str, Any], where: str) -> ParsedSample:
    return ParsedSample(sample=PromptCompletion(prompt="", completion=_text(sample["text"], "text", where), where=where))


SAMPLE_FORMATS = {
    "sharegpt": SampleFormat(
        keys=("conversations",),
        read=_sharegpt,
        looks='{"conversations": [{"from": "human", "value": ...}, ...]}',
        others=("system",),
    ),
    "messages": SampleFormat(
        keys=("messages",),
        read=_messages,
        looks='{"messages": [{"role": "user", "content": ...}, ...]}',
        others=("system",),
    ),
    "alpaca": SampleFormat(
        keys=("instruction", "output"),
        read=_alpaca,
        looks='{"instruction": ..., "input": ..., "output": ...}',
        others=("input", "history", "system"),
    ),
    "prompt_completion": SampleFormat(
        keys=("prompt", "completion"), read=_prompt_completion, looks='{"prompt": ..., "completion": ...}'
    ),
    "text": SampleFormat(keys=("text",), read=_plain, looks='{"text": ...}'),
}
EXPECTED = f"{', '.join(each.looks for each in list(SAMPLE_FORMATS.values())[:-1])} or {SAMPLE_FORMATS['text'].looks}"


def _conversation(
    turns: list[Turn], where: str, words: Mapping[str, str] = _SAME_WORDS, unread: tuple[str, ...] = ()
) -> ParsedSample:
    kept, dropped = dialogue(turns, where, words)
    return ParsedSample(sample=Conversation(turns=kept, where=where), dropped_turns=dropped, unread=unread)


def _turns(
    raw: Any, key: str, names: tuple[str, str], roles: Mapping[str, str], where: str
) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns as they stand in the file, roles and texts checked, and their keys that are not read, as `messages.id`.

    `names` are the keys of a turn's role and text.
    """
    if not isinstance(raw, list):
        raise DataError(f"{where}: `{key}` must be a list of turns; got {type(raw).__name__}.", code="data.turns_not_a_list")
    turns, notes = [], dict[str, None]()
    for number, each in enumerate(raw, start=1):
        place = f"{where}, turn {number}"
        if isinstance(each, Mapping) and names[0] in each:
            notes.update(dict.fromkeys(require_known_turn(each, place, names=names)))
        role, text = (each.get(name) for name in names) if isinstance(each, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            looks = f'{{"{names[0]}": ..., "{names[1]}": ...}}'
            raise _bad_turn(f"{place}: expected {looks} with texts; got {on_one_line(each)}.", role, text, names[1])
        if role not in roles:
            raise DataError(
                f"{place}: unknown role {on_one_line(repr(role))}; expected one of {', '.join(roles)}.",
                code="data.unknown_role",
            )
        trained = is_trained(each, place, is_answer=roles[role] == ASSISTANT)
        turns.append(Turn(role=roles[role], text=_unicode(text, place), trained=trained or roles[role] != ASSISTANT))
    return turns, tuple(f"{key}.{note}" for note in notes)


def _bad_turn(found: str, role: Any, text: Any, name: str) -> DataError:
    """For a turn whose role or text is not a text; `found`: where, and what is there."""
    if not isinstance(role, str):
        return DataError(found, code="data.bad_turn")
    if text is None:
        return DataError(
            f'{found} Give `{name}` a text, "" for a turn without one, or remove the turn.', code="data.turn_without_text"
        )
    if isinstance(text, list):
        parts = [each.get("type") for each in text if isinstance(each, Mapping)]
        if all(part == "text" for part in parts) and len(parts) == len(text):
            return DataError(f"{found} A list of parts is not read: join their texts to one.", code="data.turn_in_parts")
        return DataError(
            f"{found} A list of parts is not read, and only text is trained on: write the turn as one text, or leave the "
            "sample out.",
            code="data.turn_not_only_text",
        )
    return DataError(f"{found} Write `{name}` as one text.", code="data.turn_text_is_no_text")


def _text_or_nothing(sample: Mapping[str, Any], key: str, where: str) -> str:
    return "" if sample.get(key) is None else _text(sample[key], key, where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be a text; got {on_one_line(value)}.", code="data.not_a_text")
    return _unicode(value, where)


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half a character (a lone surrogate) in the text. Repair the text.", code="data.lone_surrogate"
        ) from error
    return text
