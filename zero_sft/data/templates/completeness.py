"""Check that a chat template shows every text other than the answers unchanged.

An answer must not be learnt without its question.

`shown` are the numbers of the messages in the order in which the template shows them, found out with stand-ins; None: the
template can't render stand-ins. Pure.
"""

import json
from collections.abc import Mapping, Sequence

from zero_sft.data.samples.conversation import ASSISTANT, SYSTEM
from zero_sft.errors import DataError


def require_places(shown: Sequence[int] | None, messages: Sequence[Mapping[str, str]], where: str) -> None:
    """Raise where a template has no place for a text that is no answer: a tool's, or a system's."""
    if shown is None:
        return
    places = frozenset(shown)
    for number, each in enumerate(messages):
        if each["content"].strip() and each["role"] != ASSISTANT and number not in places:
            raise DataError(
                f"{where}, message {number + 1}: the chat template leaves out the text of the {each['role']}. Give "
                "--chat_template one that has a place for it, or take it out of the data.",
                code="data.template_drops_text",
            )


def require_all_shown(
    text: str,
    shown: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]],
    spans: Mapping[int, tuple[int, int]],
    where: str,
) -> None:
    """Raise where a text that is no answer is left out, cut or changed, but for white space at its ends.

    A template may look at the text itself, and cut a long question. So each text is looked for where the template shows it:
    behind the text before it, and between the answers around it, which are at `spans`.
    """
    order = tuple(range(len(messages))) if shown is None else tuple(dict.fromkeys(shown))
    limits, limit = [], len(text)
    for number in reversed(order):
        limit = spans[number][0] if number in spans else limit
        limits.append(limit)
    place = 0
    for number, limit in zip(order, reversed(limits), strict=True):
        role, content = messages[number]["role"], messages[number]["content"].strip()
        if role == ASSISTANT:
            place = spans[number][1] if number in spans else place
            continue
        is_anywhere = shown is None and role == SYSTEM  # some put it into a later turn
        end = _end_of(content, text, *((0, len(text)) if is_anywhere else (place, limit)))
        if end is None:
            raise DataError(
                f"{where}, message {number + 1}: the chat template leaves out, cuts or changes the text of the {role}, so the "
                "answers would be trained on without it. Give --chat_template one that writes message['content'] as it is.",
                code="data.template_changes_texts",
            )
        place = place if is_anywhere else end


def _end_of(content: str, text: str, place: int, limit: int) -> int | None:
    """Where a content ends in `text[place:limit]`, as it is or in JSON, as some templates write a tool's."""
    found = text.find(content, place, limit)
    if found < 0:
        content = json.dumps(content, ensure_ascii=False)[1:-1]
        found = text.find(content, place, limit)
    return found + len(content) if found >= 0 else None
