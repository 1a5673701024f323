"""A chat template asked for text, and what it writes around answers, found out on a conversation of two questions."""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, USER
from zero_sft.data.templates.thoughts import CLOSE, FIELDS, OPEN, ThoughtsHandling
from zero_sft.errors import DataError
from zero_sft.printable import printable

STAND_IN = "zerosftanswer"
"""A word in place of a text, that no template looks for, strips or escapes."""

VICUNA_INSTEAD = "Give another: --chat_template vicuna takes any conversation without tools."


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFrame:
    """What a template writes around answers.

    `prompt`: what it adds when the model is to write. `stops`: what may end an answer, the usual one first; the model must
    write it itself. `thoughts`: what it does with those of an answer.
    """

    prompt: str
    stops: tuple[str, ...]
    thoughts: ThoughtsHandling


def render_chat(
    tokenizer: Any, source: str | None, messages: Sequence[Mapping[str, str]], where: str, *, prompt: bool = False
) -> str:
    """The messages as text by the tokenizer's template, or by `source`; `prompt`: and what comes before an answer.

    Raises:
        DataError: the template fails on them.
    """
    from jinja2.exceptions import TemplateSyntaxError

    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateSyntaxError as error:
        said = str(error.message).rstrip(".")
        raise DataError(
            f"the chat template is no Jinja that can be used: line {error.lineno}: {said}. Repair it.",
            code="data.template_not_jinja",
        ) from error
    except Exception as error:  # a template may fail in any way: a division by zero, a recursion
        said = printable(str(error), keep="").rstrip(".") or type(error).__name__
        raise DataError(
            f"{where}: the chat template can't render this conversation: {said}. {VICUNA_INSTEAD}", code="data.template_fails"
        ) from error
    return str(rendered)


def probe_template(tokenizer: Any, source: str | None) -> TemplateFrame:
    """Find out what a template writes around answers, on one question, and on two that are answered.

    Raises:
        DataError: it can't render them, or leaves the answers out.
    """
    where = "two questions and answers"
    question, answer = {"role": USER, "content": "question"}, {"role": ASSISTANT}
    asked = render_chat(tokenizer, source, [question], where)
    prompted = render_chat(tokenizer, source, [question], where, prompt=True)
    word = STAND_IN
    talk = [question, {**answer, "content": f"{word}0"}, {**question, "content": f"{word}1"}, {**answer, "content": f"{word}2"}]
    parts = re.split(rf"{word}\d", render_chat(tokenizer, source, talk, where))
    if len(parts) != len(talk):
        raise DataError(
            f"the chat template leaves out or changes texts, tried on {where}, so answers can't be found in it. It has to "
            f"write message['content'] as it is. {VICUNA_INSTEAD}",
            code="data.template_changes_texts",
        )
    marks = sorted((mark for mark in tokenizer.get_added_vocab() if mark.strip()), key=len, reverse=True)
    stops = find_turn_ends(parts[1], parts[3], marks)
    prompt = prompted[len(_common_beginning(asked, prompted)) :]
    if not prompt:  # some write it always: then it is behind the last answer, too
        rest = parts[3].removeprefix(next((stop for stop in stops if parts[3].startswith(stop)), ""))
        prompt = rest.lstrip()
    return TemplateFrame(prompt=prompt, stops=stops, thoughts=_probe_thoughts(tokenizer, source))


def _probe_thoughts(tokenizer: Any, source: str | None) -> ThoughtsHandling:
    """Find out where a template takes thoughts from, on two answers that have some."""
    word = STAND_IN
    inner = [f"{word}0", f"{word}1"]  # without the line ends that templates write there
    blocks = [f"{OPEN}{thoughts} {CLOSE}{word}" for thoughts in inner]
    as_text = _talk(tokenizer, source, [{"content": block} for block in blocks])
    for name in FIELDS:
        from_field = _talk(tokenizer, source, [{"content": word, name: thoughts} for thoughts in inner])
        if inner[-1] in from_field:
            if "".join(from_field.split()) == "".join(as_text.split()):
                return ThoughtsHandling(is_parsed=any(block not in as_text for block in blocks))
            return ThoughtsHandling(field=name)
    if any(block not in as_text for block in blocks):
        return ThoughtsHandling(is_parsed=True)
    return ThoughtsHandling(writes_block=as_text.count(CLOSE) > len(blocks))


def _talk(tokenizer: Any, source: str | None, answers: Sequence[Mapping[str, str]]) -> str:
    """The answers, each to a question, as text; empty where the template can't render them."""
    question = {"role": USER, "content": "question"}
    messages = [message for each in answers for message in (question, {"role": ASSISTANT, **each})]
    with contextlib.suppress(DataError):
        return render_chat(tokenizer, source, messages, "two answers with thoughts")
    return ""


def find_turn_ends(middle: str, last: str, marks: Sequence[str]) -> tuple[str, ...]:
    """What ends an answer, from what follows one in the middle of a conversation, and the last one; `marks`: longest first.

    As far as both begin alike, the first token that may end a turn, with those that follow it at once; or where they begin with
    different ones, each; where there are none, plain text but for white space.

    Worked example: "<|im_end|>\n<|im_start|>user\n" and "<|im_end|>\n" → "<|im_end|>".
    """
    common = _common_beginning(middle, last)
    end = min((common.find(mark) for mark in marks if mark in common), default=None)
    if end is not None:
        while mark := next((mark for mark in marks if common.startswith(mark, end)), ""):
            end += len(mark)
        return (common[:end],)
    found = []
    for text in (middle, last):
        skip = len(text) - len(text.lstrip())
        mark = next((mark for mark in marks if text.startswith(mark, skip)), "")
        found += [text[: skip + len(mark)]] if mark else []
    breaks_off = all(not rest[:1].isspace() and rest for rest in (middle[len(common) :], last[len(common) :]))
    if found or breaks_off or not common.strip():  # a part of two different words ends nothing
        return tuple(found)
    return (common.rstrip(),)


def _common_beginning(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(char for char, _ in same)
