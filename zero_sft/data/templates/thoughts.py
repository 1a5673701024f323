"""Split the thoughts, between `<think>` and `</think>`, from the beginning of an answer, as the chat template needs them.

Some templates treat thoughts as text, some look for them in the text, and some read them only from a field of the message. The
last kind writes an empty block before the text, so thoughts in the text would be a second block. `probe.probe_template` finds
the kind once per template. An answer is split accordingly, or refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import Turn
from zero_sft.errors import DataError

OPEN, CLOSE = "<think>", "</think>"

_BLOCK = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)
_ONLY_CLOSED = re.compile(rf"(?!\s*{OPEN})((?:.*\n)??)[ \t]*{CLOSE}[ \t]*(?:\n\s*|$)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtsHandling:
    """A template's way of handling thoughts; by default it treats them as ordinary text.

    `is_parsed`: it looks for them in the text. `field`: it reads them only from this field of the message. `writes_block`: it
    writes a block of thoughts, perhaps an empty one, before every text.
    """

    field: str | None = None
    is_parsed: bool = False
    writes_block: bool = False

    @property
    def as_text(self) -> bool:
        """Whether the template treats the tags as ordinary text."""
        return not (self.field or self.is_parsed or self.writes_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer in the form that the template takes: `content` and, if there is a `field`, `thoughts` in that field.

    Without a `field`, `thoughts` is the part of `content` with the tags and the white space around them. `text` is the answer
    after the thoughts.
    """

    content: str
    text: str
    thoughts: str = ""
    field: str | None = None

    @property
    def has_thoughts(self) -> bool:
        """Whether the thoughts contain anything but white space."""
        return bool(self.thoughts.replace(OPEN, "").replace(CLOSE, "").strip())

    def message(self, role: str) -> dict[str, Any]:
        """Return the message for the chat template."""
        return {"role": role, "content": self.content, **({self.field: self.thoughts} if self.field else {})}


Answers = Mapping[int, Answer]
"""The answers of a conversation that have a text, by the index of their turn."""


def split_answer(turn: Turn, handling: ThoughtsHandling, where: str) -> Answer:
    """Split an answer into thoughts and text, as the template handles them; `where` names the message.

    Raises:
        DataError: thoughts for which the template has no place, tags that don't mark the thoughts clearly, or thoughts alone.
    """
    if not turn.thoughts:
        return _split_text(turn.text, handling, where, has_calls=bool(turn.calls))
    if not turn.text.strip() and not turn.calls:
        raise empty_answer_error(where)
    if handling.field:
        return Answer(content=turn.text, text=turn.text, thoughts=turn.thoughts.strip(), field=handling.field)
    if handling.is_parsed:
        text = f"{OPEN}\n{turn.thoughts.strip()}\n{CLOSE}\n\n{turn.text.lstrip()}"
        return _split_text(text, handling, where, has_calls=bool(turn.calls))
    raise DataError(
        f"{where}: the answer has thoughts in a field, and the chat template has no place for them. Give --reasoning inline, "
        "which writes them into the text, or --reasoning drop.",
        code="data.template_takes_no_thoughts",
    )


def _split_text(content: str, handling: ThoughtsHandling, where: str, *, has_calls: bool) -> Answer:
    """Split the text of an answer; raises `DataError`."""
    if CLOSE not in content and OPEN not in content:
        return Answer(content=content, text=content)
    if not handling.as_text and _ONLY_CLOSED.match(content):
        content = f"{OPEN}\n{content}"
    block = _BLOCK.match(content)
    thoughts, text = (content[: block.end()], content[block.end() :]) if block else ("", content)
    if block is None and content.lstrip().startswith(OPEN) and not handling.as_text:
        raise DataError(
            f"{where}: the answer begins with {OPEN}, but has no {CLOSE}. Close the thoughts, or remove them.",
            code="data.thoughts_not_closed",
        )
    if CLOSE in text and not handling.as_text:
        raise DataError(
            f"{where}: the text of the answer contains {CLOSE}, but the chat template separates thoughts from text. Put them "
            f"once at the beginning of the answer, between {OPEN} and {CLOSE}, or remove the tag.",
            code="data.thoughts_in_text",
        )
    if not block or handling.is_parsed or handling.as_text:
        return Answer(content=content, thoughts=thoughts, text=text)
    if handling.field is None:
        if not block[1].strip():
            return Answer(content=text, text=text)
        raise DataError(
            f"{where}: the chat template itself writes a block of thoughts up to {CLOSE} before each answer, and takes none "
            "from the data. Give --chat_template a template that takes thoughts, or remove them.",
            code="data.template_takes_no_thoughts",
        )
    if not text.strip() and not has_calls:
        raise empty_answer_error(where)
    inner = block[1].strip()
    return Answer(content=text, thoughts=inner, text=text, field=handling.field if inner else None)


def empty_answer_error(where: str) -> DataError:
    """Make the error for an answer of which the template leaves no text."""
    return DataError(
        f"{where}: the chat template leaves nothing of this answer but its end token. Expected an answer with more than white "
        "space and thoughts, or an entirely empty one.",
        code="data.nothing_left_of_answer",
    )


def find_thoughts(before: str, thoughts: str, *, at_end: bool) -> int | None:
    """Find the last position of the thoughts, with their tags, in the template's text; None if they are left out.

    `at_end`: nothing but white space follows them in the text `before` the answer.
    """
    expected, positions = _BLOCK.fullmatch(thoughts), [tag.start() for tag in re.finditer(OPEN, before)]
    for position in reversed(positions):
        block = _BLOCK.fullmatch(before, position) if at_end else _BLOCK.match(before, position)
        if block and expected and block[1].strip() == expected[1].strip():
            return position
    return None
