"""Check that a chat template shows every text other than the answers unchanged. Pure.

An answer must not be learnt without its question.

`shown` lists the indices of the messages in the order in which the template shows them, as found with stand-ins. It is None if
the template can't render stand-ins.
"""

import json
from collections.abc import Mapping, Sequence

from zero_sft.data.samples.conversation import ASSISTANT, SYSTEM, Conversation, Messages
from zero_sft.data.templates.calls import CallHandling
from zero_sft.data.templates.rendered import Span
from zero_sft.errors import DataError


def require_places(shown: Sequence[int] | None, messages: Messages, where: str) -> None:
    """Raise `DataError` if the template leaves out a text that is not an answer, such as a tool's or the system's."""
    if shown is None:
        return
    shown_indices = frozenset(shown)
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT and message["content"].strip() and index not in shown_indices:
            raise DataError(
                f"{where}, message {index + 1}: the chat template leaves out the text of the {message['role']}. Give "
                "--chat_template a template that shows it, or remove the text from the data.",
                code="data.template_drops_text",
            )


def require_all_shown(
    text: str, shown: Sequence[int] | None, messages: Messages, spans: Mapping[int, Span], where: str
) -> None:
    """Raise `DataError` if a text that is not an answer is missing in `text` or changed, except for white space at its ends.

    A template may depend on the text itself, for example cut a long question. So each text is searched for where the template
    shows it: after the previous text, and between the neighbouring answers, whose positions are `spans`.
    """
    order = tuple(range(len(messages))) if shown is None else tuple(dict.fromkeys(shown))
    limits, limit = [], len(text)
    for index in reversed(order):
        limit = spans[index][0] if index in spans else limit
        limits.append(limit)
    position = 0
    for index, limit in zip(order, reversed(limits), strict=True):
        role = messages[index]["role"]
        if role == ASSISTANT:
            position = spans[index][1] if index in spans else position
            continue
        content = messages[index]["content"].strip()
        is_anywhere = shown is None and role == SYSTEM  # some templates put it into a later turn
        end = _end_of(content, text, *((0, len(text)) if is_anywhere else (position, limit)))
        if end is None:
            raise DataError(
                f"{where}, message {index + 1}: the chat template leaves out, cuts or changes the text of the {role}, so the "
                "answers would be trained on without it. Give --chat_template one that writes message['content'] unchanged.",
                code="data.template_changes_texts",
            )
        position = position if is_anywhere else end


def require_place_for_calls(conversation: Conversation, handling: CallHandling) -> None:
    """Raise `DataError` if a conversation has calls of tools, and the template does not render calls."""
    if handling.form is not None:
        return
    for index, turn in enumerate(conversation.turns):
        if turn.calls:
            raise DataError(
                f"{conversation.where}, message {index + 1}: the chat template does not render calls of tools. Give "
                "--chat_template a template that does, such as hermes, or write the calls into the text of the answer.",
                code="data.template_without_calls",
            )


def require_tools(text: str, spans: Mapping[int, Span], conversation: Conversation) -> None:
    """Raise `DataError` if the template leaves out a tool, a parameter of one, or an argument of a call."""
    start = max((begin for begin, _ in spans.values()), default=len(text))  # some show tools before the last question alone
    for tool in json.loads(conversation.tools or "[]"):
        properties = (tool["function"].get("parameters") or {}).get("properties") or {}
        missing = [name for name in (tool["function"]["name"], *properties) if name not in text[:start]]
        if missing:
            raise DataError(
                f"{conversation.where}: the chat template leaves out {missing[0]!r} of the tool {tool['function']['name']!r}. "
                "Give --chat_template a template that shows tools, such as hermes, or --tools ignore if the texts show them.",
                code="data.template_drops_tools",
            )
    for index, (begin, end) in spans.items():
        for call in conversation.turns[index].calls:
            missing = [name for name in json.loads(call.arguments) if name not in text[begin:end]]
            if missing:
                raise DataError(
                    f"{conversation.where}, message {index + 1}: the chat template leaves out the argument {missing[0]!r} of a "
                    f"call of {call.name!r}. Give --chat_template another template.",
                    code="data.template_drops_arguments",
                )


def _end_of(content: str, text: str, start: int, limit: int) -> int | None:
    """Find where `content` ends in `text[start:limit]`, unchanged or as JSON, which some templates write for tools."""
    position = text.find(content, start, limit)
    if position < 0:
        content = json.dumps(content, ensure_ascii=False)[1:-1]
        position = text.find(content, start, limit)
    return position + len(content) if position >= 0 else None
