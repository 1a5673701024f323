"""Find out how a chat template takes calls of tools, and what it writes after them."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, USER, Messages, ToolCall
from zero_sft.data.templates.chat import DEFAULT_FORM, CallForm, call_message
from zero_sft.data.templates.stand_ins import STAND_IN

Render = Callable[[Messages, Sequence[Mapping[str, Any]] | None], str]
"""Renders messages with tools; returns an empty text if the template can't."""

_NAME, _KEY, _VALUE, _RESULT, _ANSWER = (f"{STAND_IN}{letter}" for letter in "nkvra")
_ID = "zerosft01"
_FORMS = (
    DEFAULT_FORM,
    CallForm(arguments_as_text=True),
    CallForm(empty_content=None),
    CallForm(arguments_as_text=True, empty_content=None),
    CallForm(short_ids=True),
    CallForm(short_ids=True, arguments_as_text=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHandling:
    """A template's way of handling calls: their `form`, None if it has no place for them, and the texts that may `end` them."""

    form: CallForm | None = None
    ends: tuple[str, ...] = ()


def probe_calls(render: Render, turn_ends: Sequence[str], marks: Sequence[str]) -> CallHandling:
    """Find the form in which a template takes calls, and the text that ends an answer with calls.

    A form is right if name and arguments are shown, and the arguments neither as a Python dictionary nor as JSON in JSON.

    Args:
        turn_ends: the texts that end an answer without calls.
        marks: the added tokens, longest first.
    """
    for form in _FORMS:
        called, answered = render(_conversation(form, is_answered=False), [_tool()]), render(_conversation(form), [_tool()])
        if _is_shown(answered):
            after = answered[answered.rindex(_VALUE) + len(_VALUE) : answered.rindex(_RESULT)]
            common = common_prefix(after, called[called.rindex(_VALUE) + len(_VALUE) :]) if _VALUE in called else after
            return CallHandling(form=form, ends=_ends_of(common, turn_ends, marks))
    return CallHandling()


def _is_shown(text: str) -> bool:
    if any(word not in text for word in (_NAME, _KEY, _VALUE, _RESULT, _ANSWER)):
        return False
    return text.rfind(_VALUE) < text.rfind(_RESULT) and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text


def _ends_of(after: str, turn_ends: Sequence[str], marks: Sequence[str]) -> tuple[str, ...]:
    """Return the text that ends an answer with calls: that of other answers if it is there, else the last added token."""
    known = [end for end in turn_ends if end in after]
    last = max((mark for mark in marks if mark in after), key=lambda mark: after.rindex(mark) + len(mark), default="")
    return tuple(known) or ((last,) if last else ())


def _tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {_KEY: {"type": "string", "description": "text"}}, "required": [_KEY]}
    return {"type": "function", "function": {"name": _NAME, "description": "text", "parameters": parameters}}


def _conversation(form: CallForm, *, is_answered: bool = True) -> list[dict[str, Any]]:
    call_id = _ID if form.short_ids else ""
    call = call_message(ToolCall(name=_NAME, arguments=json.dumps({_KEY: _VALUE})), call_id, form)
    messages = [{"role": USER, "content": "question"}, {"role": ASSISTANT, "content": form.empty_content, "tool_calls": [call]}]
    if is_answered:
        ids = {"tool_call_id": call_id} if call_id else {}
        messages += [{"role": TOOL, "content": _RESULT, "name": _NAME, **ids}, {"role": ASSISTANT, "content": _ANSWER}]
    return messages


def common_prefix(text: str, other: str) -> str:
    """Return the text with which both begin."""
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    return "".join(char for char, _ in equal)
