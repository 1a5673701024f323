"""Thoughts at the beginning of an answer, between `<think>` and `</think>`, and how a chat template takes them.

Some templates take them for text, some find them in the text, and some take them from a field of the message alone: these
write an empty block before the text, and thoughts in the text would be a second one. Which it is, is found out once a template
(`habits.learn_habits`). An answer is split accordingly, or refused.
"""

import re
from dataclasses import dataclass
from typing import Any

from zero_sft.errors import DataError

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The fields of a message that templates take thoughts from."""

OPEN, CLOSE = "<think>", "</think>"

_BLOCK = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)
_ONLY_CLOSED = re.compile(rf"(?!\s*{OPEN})((?:.*\n)??)[ \t]*{CLOSE}[ \t]*(?:\n\s*|$)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtsHandling:
    """How a template takes thoughts: as text like any other; `is_parsed`, it finds them in the text; or from a `field` alone.

    `writes_block`: it writes a block of thoughts, if an empty one, before any text.
    """

    field: str | None = None
    is_parsed: bool = False
    writes_block: bool = False

    @property
    def as_text(self) -> bool:
        """Whether the tags are nothing special to the template."""
        return not (self.field or self.is_parsed or self.writes_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer as a template is given it: `content`, and where `field` is named, `thoughts` in that field.

    `thoughts`: in `content`, with their tags and the white space around them; or the field's text. `text` is what follows them.
    """

    content: str
    text: str
    thoughts: str = ""
    field: str | None = None

    def message(self, role: str) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": role, "content": self.content, **({self.field: self.thoughts} if self.field else {})}


def split_answer(content: str, habit: ThoughtsHandling, where: str) -> Answer:
    """An answer's thoughts and the rest, for a template of that habit; `where` names the message.

    Raises:
        DataError: thoughts that the template has no place for, or tags that don't tell what is thought.
    """
    if CLOSE not in content and OPEN not in content:
        return Answer(content=content, text=content)
    found = _BLOCK.match(content)
    if habit.as_text:
        thoughts, text = (content[: found.end()], content[found.end() :]) if found else ("", content)
        return Answer(content=content, thoughts=thoughts, text=text)
    if found is None and _ONLY_CLOSED.match(content):
        content = f"{OPEN}\n{content}"
        found = _BLOCK.match(content)
    if found is None and content.lstrip().startswith(OPEN):
        raise DataError(
            f"{where}: the answer begins with {OPEN}, and there is no {CLOSE}. Close the thoughts, or remove them.",
            code="data.thoughts_not_closed",
        )
    thoughts, text = (content[: found.end()], content[found.end() :]) if found else ("", content)
    if CLOSE in text:
        raise DataError(
            f"{where}: the text of the answer has {CLOSE} in it, and the chat template keeps thoughts apart from the text. Put "
            f"them at the beginning of the answer, between {OPEN} and {CLOSE} once, or remove the tag.",
            code="data.thoughts_in_text",
        )
    if not found or habit.is_parsed:
        return Answer(content=content, thoughts=thoughts, text=text)
    if habit.field is None:
        if not found[1].strip():
            return Answer(content=text, text=text)
        raise DataError(
            f"{where}: the chat template writes thoughts up to {CLOSE} itself, before each answer, and takes none from data. "
            "Give --chat_template one that does, or remove the thoughts.",
            code="data.template_takes_no_thoughts",
        )
    if not text.strip():
        raise nothing_left(where)
    inner = found[1].strip()
    return Answer(content=text, thoughts=inner, text=text, field=habit.field if inner else None)


def nothing_left(where: str) -> DataError:
    """The error of an answer without a text."""
    return DataError(
        f"{where}: the chat template leaves nothing of this answer but its end. Give it more than white space and thoughts, or "
        "nothing.",
        code="data.nothing_left_of_answer",
    )


def kept_at(before: str, thoughts: str) -> int | None:
    """Where thoughts with their tags stand in what a template wrote, the last such place; None if they are left out."""
    places = [each.start() for each in re.finditer(OPEN, before) if _same(before[each.start() :], thoughts)]
    return places[-1] if places else None


def _same(text: str, thoughts: str) -> bool:
    """True if a text is these thoughts, but for white space."""
    one, other = _BLOCK.fullmatch(text), _BLOCK.fullmatch(thoughts)
    return one is not None and other is not None and one[1].strip() == other[1].strip()


def has_thoughts(answer: Answer) -> bool:
    """Whether there is anything but white space in an answer's thoughts."""
    return bool(answer.thoughts.replace(OPEN, "").replace(CLOSE, "").strip())
