"""Check that a chat template shows every text other than the answers unchanged. Pure.

An answer must not be learnt without its question.

`shown` lists the indices of the messages in the order in which the template shows them, as found with stand-ins. It is None if
the template can't render stand-ins.
"""

import json
from collections.abc import Mapping, Sequence

from zero_sft.data.samples.conversation import ASSISTANT, SYSTEM, Messages
from zero_sft.data.templates.rendered import Span
from zero_sft.errors import DataError


def require_places(shown: Sequence[int] | None, messages: Messages, where: str) -> None:
    """Raise `DataError` if the template leaves out a text that is not an answer, such as a tool's or the system's."""
    if shown is None:
        return
    shown_indices = frozenset(shown)
    for index, message in enumerate(messages):
        if message["content"].strip() and message["role"] != ASSISTANT and index not in shown_indices:
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
        role, content = messages[index]["role"], messages[index]["content"].strip()
        if role == ASSISTANT:
            position = spans[index][1] if index in spans else position
            continue
        is_anywhere = shown is None and role == SYSTEM  # some templates put it into a later turn
        end = _end_of(content, text, *((0, len(text)) if is_anywhere else (position, limit)))
        if end is None:
            raise DataError(
                f"{where}, message {index + 1}: the chat template leaves out, cuts or changes the text of the {role}, so the "
                "answers would be trained on without it. Give --chat_template one that writes message['content'] unchanged.",
                code="data.template_changes_texts",
            )
        position = position if is_anywhere else end


def _end_of(content: str, text: str, start: int, limit: int) -> int | None:
    """Find where `content` ends in `text[start:limit]`, unchanged or as JSON, which some templates write for tools."""
    position = text.find(content, start, limit)
    if position < 0:
        content = json.dumps(content, ensure_ascii=False)[1:-1]
        position = text.find(content, start, limit)
    return position + len(content) if position >= 0 else None
