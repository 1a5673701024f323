"""A conversation as chat templates take it: messages, tools, and variables. Pure.

Templates differ in how they want calls of tools: the arguments as an object or as text, the content of a message without a text
as an empty text or as null, and ids of a fixed length. `probe_calls` finds the `CallForm` of a template.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, Conversation, Messages, ToolCall, Turn
from zero_sft.data.templates.thoughts import Answers

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """The input of a chat template. `variables` are those that a sample sets; `tools` is None without any."""

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_tools(self) -> bool:
        """Whether there are tools, or calls of tools."""
        return bool(self.tools) or any("tool_calls" in message for message in self.messages)

    def with_messages(self, messages: Messages) -> "Chat":
        """Return the same chat with other messages."""
        return replace(self, messages=messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """The form in which a template takes calls.

    `arguments_as_text`: as JSON text instead of an object. `empty_content`: the content of a message without a text.
    `short_ids`: every call has an id of nine letters and digits (Mistral's).
    """

    arguments_as_text: bool = False
    empty_content: str | None = ""
    short_ids: bool = False


DEFAULT_FORM = CallForm()


def chat_of(conversation: Conversation, answers: Answers, form: CallForm) -> Chat:
    """Return the chat of a conversation. `answers` are its answers with a text or calls, by the index of their turn."""
    ids = _ids_of_calls(conversation.turns, short=form.short_ids)
    messages = []
    for index, turn in enumerate(conversation.turns):
        message: dict[str, Any] = (
            answers[index].message(turn.role) if index in answers else {"role": turn.role, "content": turn.text}
        )
        if turn.calls:
            calls = zip(turn.calls, ids[index], strict=True)
            message["tool_calls"] = [call_message(call, call_id, form) for call, call_id in calls]
            message["content"] = message["content"] or form.empty_content
        if turn.role == TOOL:
            message |= {"name": turn.name} if turn.name else {}
            message |= {"tool_call_id": ids[index][0]} if ids[index] else {}
        messages.append(message)
    return Chat(
        messages=messages,
        tools=json.loads(conversation.tools) if conversation.tools else None,
        variables=json.loads(conversation.template_kwargs) if conversation.template_kwargs else {},
    )


def call_message(call: ToolCall, call_id: str, form: CallForm) -> dict[str, Any]:
    """Return a call as it stands in a message."""
    arguments = call.arguments if form.arguments_as_text else json.loads(call.arguments)
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _ids_of_calls(turns: Sequence[Turn], *, short: bool) -> list[tuple[str, ...]]:
    """Return the ids of each turn's calls, and for a tool's turn the id of the call that it answers, if there is one.

    With `short`, ids that have not nine letters and digits, or are missing, are replaced by such ones, which depend only on the
    id or the position of the call. Otherwise, missing ids are filled in if an answer has several calls, since templates may
    tell by them which call a tool's turn answers.
    """
    ids, calls, position, count = list[tuple[str, ...]](), tuple[ToolCall, ...](), 0, 0
    for index, turn in enumerate(turns):
        if turn.role == ASSISTANT:
            calls, position = turn.calls, 0
            if short:
                calls = tuple(replace(call, call_id=_short_id(call.call_id, index, n)) for n, call in enumerate(calls))
            elif len(calls) > 1 and not all(call.call_id for call in calls):
                calls = tuple(replace(call, call_id=f"functions.{call.name}:{count + n}") for n, call in enumerate(calls))
            count += len(calls)
            ids.append(tuple(call.call_id for call in calls))
            continue
        call_id = turn.call_id
        if turn.role == TOOL:
            by_position = calls[position].call_id if position < len(calls) else ""
            call_id = _short_id(call_id, index, 0) if short and call_id else call_id or by_position
            position += 1
        ids.append((call_id,) if call_id else ())
    return ids


def _short_id(call_id: str, turn: int, number: int) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode() if call_id else f"{turn} {number}".encode()).hexdigest()[:9]


def string_leaves(value: Any) -> list[str]:
    """Return the non-empty texts in arguments of a call, in order; keys are not among them."""
    if isinstance(value, str):
        return [value] if value else []
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [leaf for child in children for leaf in string_leaves(child)]


def replace_leaves(value: Any, stand_ins: Sequence[str]) -> Any:
    """Replace the texts that `string_leaves` returns, in the same order."""
    return _replace_leaves(value, iter(stand_ins))


def _replace_leaves(value: Any, rest: Any) -> Any:
    if isinstance(value, str):
        return next(rest) if value else value
    if isinstance(value, Mapping):
        return {key: _replace_leaves(child, rest) for key, child in value.items()}
    return [_replace_leaves(child, rest) for child in value] if isinstance(value, list) else value
