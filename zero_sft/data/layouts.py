"""From one object of a file to a sample: the layouts in which conversations are passed around.

    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}
    prompt_completion   {"prompt": ..., "completion": ...}, both text, or both lists of messages
    text                {"text": ...}

An object that has the keys of several is of the first of them whose lists are not empty. A turn with `"train": false` or
`"weight": 0` is not trained on. Alpaca's is one question, the instruction with the input below it, and one answer, after a
`history` of such pairs if there is one. The first three may have a `system` text beside. Plain text (`text`, and prompts and
completions that are text) is taken as it is, without a template. What belongs to a conversation and isn't read (`tools`) is
refused: the model would be trained on another conversation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zero_sft.data.conversation import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Passage, Sample, Turn, dialogue
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A sample, and how many turns were dropped before the first question and behind the last answer."""

    sample: Sample
    leading: int = 0
    unanswered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to write a sample: the keys by which it is known, what it looks like, and how it is read.

    `unread`: keys that belong to a conversation, too, and are refused here.
    """

    keys: tuple[str, ...]
    looks: str
    read: Callable[[Mapping[str, Any], str], Found]
    unread: tuple[str, ...] = ("tools", "functions", "history")


_SHAREGPT_ROLES = {
    "human": USER, "user": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT,
    "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL,
}  # fmt: skip
_SAME_WORDS: Mapping[str, str] = {}
_SHAREGPT_WORDS = {USER: "human", ASSISTANT: "gpt"}
_UNRENDERED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_NOTHING = (None, "", [], {}, "[]", "{}")
_MESSAGE_ROLES = {each: each for each in (USER, ASSISTANT, SYSTEM, TOOL)}


def read_sample(sample: Any, where: str, data_format: str | None = None) -> tuple[str, Found]:
    """The sample that an object of a file is, and the name of its layout.

    Args:
        data_format: the layout that it must have; None takes the one whose keys it has.

    Raises:
        DataError: an object of no layout, or one that is not written as its layout says.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: expected {EXPECTED}; got {type(sample).__name__}.")
    names = [data_format] if data_format else list(LAYOUTS)
    fitting = [name for name in names if all(sample.get(key) is not None for key in LAYOUTS[name].keys)]
    for name in sorted(fitting, key=lambda name: any(sample[key] == [] for key in LAYOUTS[name].keys)):
        for key in LAYOUTS[name].unread:
            if sample.get(key) not in _NOTHING:
                raise DataError(f"{where}: `{key}` is not read in the format {name}. Write it into the texts, or remove it.")
        return name, LAYOUTS[name].read(sample, where)
    keys = ", ".join([f"{key!r}{' (null)' * (value is None)}" for key, value in sample.items()][:8]) or "none"
    wanted = f"--data_format {data_format}: expected {LAYOUTS[data_format].looks}" if data_format else f"expected {EXPECTED}"
    raise DataError(f"{where}: {wanted}; got the keys {keys}.")


def _sharegpt(sample: Mapping[str, Any], where: str) -> Found:
    turns = _turns(sample["conversations"], "conversations", ("from", "value"), _SHAREGPT_ROLES, where)
    return _conversation(_with_system(sample, turns, where), where, _SHAREGPT_WORDS)


def _messages(sample: Mapping[str, Any], where: str) -> Found:
    turns = _turns(sample["messages"], "messages", ("role", "content"), _MESSAGE_ROLES, where)
    return _conversation(_with_system(sample, turns, where), where)


def _alpaca(sample: Mapping[str, Any], where: str) -> Found:
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
    if pairs in _NOTHING:
        return []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise DataError(f"{where}: `history` must be a list of pairs of a question and an answer; got {str(pairs)[:80]}.")
    return pairs


def _with_system(sample: Mapping[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """The turns, after the `system` text that stands beside them if there is one."""
    text = _text_or_nothing(sample, "system", where)
    if text and turns and turns[0].role == SYSTEM:
        raise DataError(f"{where}: a system text among the turns and one beside them, `system`. Remove one.")
    return [Turn(role=SYSTEM, text=text), *turns] if text else turns


def _prompt_completion(sample: Mapping[str, Any], where: str) -> Found:
    prompt, completion = sample["prompt"], sample["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, answered = (
            _turns(sample[key], key, ("role", "content"), _MESSAGE_ROLES, where) for key in ("prompt", "completion")
        )
        return _conversation([*(replace(turn, trained=False) for turn in asked), *answered], where)
    texts = (_text(prompt, "prompt", where), _text(completion, "completion", where))
    return Found(sample=Passage(prompt=texts[0], completion=texts[1], where=where))


def _plain(sample: Mapping[str, Any], where: str) -> Found:
    return Found(sample=Passage(prompt="", completion=_text(sample["text"], "text", where), where=where))


LAYOUTS = {
    "sharegpt": Layout(
        keys=("conversations",), read=_sharegpt, looks='{"conversations": [{"from": "human", "value": ...}, ...]}'
    ),
    "messages": Layout(keys=("messages",), read=_messages, looks='{"messages": [{"role": "user", "content": ...}, ...]}'),
    "alpaca": Layout(
        keys=("instruction", "output"),
        read=_alpaca,
        looks='{"instruction": ..., "input": ..., "output": ...}',
        unread=("tools", "functions"),
    ),
    "prompt_completion": Layout(
        keys=("prompt", "completion"),
        read=_prompt_completion,
        looks='{"prompt": ..., "completion": ...}',
        unread=("system", "tools", "functions", "history"),
    ),
    "text": Layout(keys=("text",), read=_plain, looks='{"text": ...}', unread=()),
}
EXPECTED = f"{', '.join(each.looks for each in list(LAYOUTS.values())[:-1])} or {LAYOUTS['text'].looks}"


def _conversation(turns: list[Turn], where: str, words: Mapping[str, str] = _SAME_WORDS) -> Found:
    kept = dialogue(turns, where, words)
    return Found(sample=Conversation(turns=kept.turns, where=where), leading=kept.leading, unanswered=kept.unanswered)


def _turns(raw: Any, key: str, names: tuple[str, str], roles: Mapping[str, str], where: str) -> list[Turn]:
    """The turns as they stand in the file, roles and texts checked; `names` are the keys of a turn's role and text."""
    if not isinstance(raw, list):
        raise DataError(f"{where}: `{key}` must be a list of turns; got {type(raw).__name__}.")
    turns = []
    for number, each in enumerate(raw, start=1):
        place = f"{where}, turn {number}"
        role, text = (each.get(name) for name in names) if isinstance(each, Mapping) else (None, None)
        for key in _UNRENDERED if isinstance(each, Mapping) else ():
            if each.get(key):
                raise DataError(f"{place}: `{key}` is not rendered. Write it into the text, as the model writes it.")
        if not isinstance(role, str) or not isinstance(text, str):
            looks = f'{{"{names[0]}": ..., "{names[1]}": ...}}'
            raise DataError(f"{place}: expected {looks} with texts; got {str(each)[:80]}.")
        if role not in roles:
            raise DataError(f"{place}: unknown role {role!r}; expected one of {', '.join(roles)}.")
        turns.append(Turn(role=roles[role], text=_unicode(text, place), trained=_is_trained(each, place)))
    return turns


def _is_trained(turn: Mapping[str, Any], place: str) -> bool:
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        given = f'"train": {train!r}' if train not in (None, True, False) else f'"weight": {weight!r}'
        raise DataError(f'{place}: {given}; expected "train": true or false, or "weight": 0 or 1.')
    return (train is None or bool(train)) and weight != 0


def _text_or_nothing(sample: Mapping[str, Any], key: str, where: str) -> str:
    return "" if sample.get(key) is None else _text(sample[key], key, where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be a text; got {str(value)[:80]}.")
    return _unicode(value, where)


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: half a character (a lone surrogate) in the text. Repair the text.") from error
    return text
