"""Render with a chat template, and probe with a conversation of two questions what it writes around answers."""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, THOUGHTS_FIELDS, USER, Messages
from zero_sft.data.templates.thoughts import CLOSE, OPEN, ThoughtsHandling
from zero_sft.data.templates.time_limit import TimeOver, time_limit
from zero_sft.errors import DataError
from zero_sft.printable import printable

RENDER_SECONDS = 10.0
"""The longest time for one conversation. Real templates take a millisecond for a thousand turns."""

STAND_IN = "zerosftanswer"
"""A placeholder for a text; templates neither look for it nor strip nor escape it."""

VICUNA_INSTEAD = "Use another template: --chat_template vicuna takes any conversation without tools."


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """The text that a template writes around answers.

    `generation_prompt` comes before an answer. `turn_ends` are the texts that may end one, the usual one first; the model must
    write them itself. `thoughts` tells how the template handles the thoughts of an answer.
    """

    generation_prompt: str
    turn_ends: tuple[str, ...]
    thoughts: ThoughtsHandling


def render_chat(tokenizer: Any, source: str | None, messages: Messages, where: str, *, generation_prompt: bool = False) -> str:
    """Render messages with `source`, or the tokenizer's template if it is None; raise `DataError` if the template fails."""
    from jinja2.exceptions import TemplateSyntaxError

    try:
        with time_limit(RENDER_SECONDS):
            rendered = tokenizer.apply_chat_template(
                list(messages), chat_template=source, tokenize=False, add_generation_prompt=generation_prompt
            )
    except TimeOver as error:
        raise DataError(
            f"{where}: the chat template takes more than {RENDER_SECONDS:g} s for this conversation, so it probably loops. "
            f"{VICUNA_INSTEAD}",
            code="data.template_loops",
        ) from error
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {reason}. Repair it.",
            code="data.template_not_jinja",
        ) from error
    except Exception as error:  # a template may fail in any way: a division by zero, a recursion
        reason = printable(str(error), keep="").rstrip(".") or type(error).__name__
        raise DataError(
            f"{where}: the chat template can't render this conversation: {reason}. {VICUNA_INSTEAD}", code="data.template_fails"
        ) from error
    return str(rendered)


def probe_template(tokenizer: Any, source: str | None) -> TemplateTraits:
    """Find out what a template writes around answers, from one open question and two answered ones; raises `DataError`."""
    where = "two questions and answers"
    question, answer = {"role": USER, "content": "question"}, {"role": ASSISTANT}
    unprompted = render_chat(tokenizer, source, [question], where)
    prompted = render_chat(tokenizer, source, [question], where, generation_prompt=True)
    word = STAND_IN
    chat = [question, {**answer, "content": f"{word}0"}, {**question, "content": f"{word}1"}, {**answer, "content": f"{word}2"}]
    parts = re.split(rf"{word}\d", render_chat(tokenizer, source, chat, where))
    if len(parts) != len(chat):
        raise DataError(
            f"the chat template leaves out or changes texts (tried with {where}), so answers can't be located. It has to "
            f"write message['content'] unchanged. {VICUNA_INSTEAD}",
            code="data.template_changes_texts",
        )
    added_tokens = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
    turn_ends = find_turn_ends(parts[1], parts[3], added_tokens)
    prompt = prompted[len(_common_prefix(unprompted, prompted)) :]
    if not prompt:  # some templates always write the prompt, so it follows the last answer as well
        rest = parts[3].removeprefix(next((turn_end for turn_end in turn_ends if parts[3].startswith(turn_end)), ""))
        prompt = rest.lstrip()
    return TemplateTraits(generation_prompt=prompt, turn_ends=turn_ends, thoughts=_probe_thoughts(tokenizer, source))


def _probe_thoughts(tokenizer: Any, source: str | None) -> ThoughtsHandling:
    """Find out how a template takes thoughts, from two answers with thoughts."""
    word = STAND_IN
    inner = [f"{word}0", f"{word}1"]  # without the line ends that templates write around thoughts
    blocks = [f"{OPEN}{thoughts} {CLOSE}{word}" for thoughts in inner]
    as_text = _render_answers(tokenizer, source, [{"content": block} for block in blocks])
    is_parsed = any(block not in as_text for block in blocks)
    for name in THOUGHTS_FIELDS:
        from_field = _render_answers(tokenizer, source, [{"content": word, name: thoughts} for thoughts in inner])
        if inner[-1] in from_field:
            if "".join(from_field.split()) == "".join(as_text.split()):
                return ThoughtsHandling(is_parsed=is_parsed)
            return ThoughtsHandling(field=name)
    return ThoughtsHandling(is_parsed=is_parsed, writes_block=not is_parsed and as_text.count(CLOSE) > len(blocks))


def _render_answers(tokenizer: Any, source: str | None, answers: Sequence[Mapping[str, str]]) -> str:
    """Render the answers, each after a question; return an empty text if the template can't."""
    question = {"role": USER, "content": "question"}
    messages = [message for answer in answers for message in (question, {"role": ASSISTANT, **answer})]
    with contextlib.suppress(DataError):
        return render_chat(tokenizer, source, messages, "two answers with thoughts")
    return ""


def find_turn_ends(middle: str, last: str, marks: Sequence[str]) -> tuple[str, ...]:
    """Find the texts that end an answer.

    Args:
        middle: the text after an answer in the middle of a conversation.
        last: the text after the last answer.
        marks: the added tokens, longest first.

    Returns:
        The first mark in the common prefix of both texts, with the marks that directly follow it. If the two texts begin with
        different marks, both. If there are no marks, the common prefix without trailing white space.

    Worked example: "<|im_end|>\n<|im_start|>user\n" and "<|im_end|>\n" → "<|im_end|>".
    """
    common = _common_prefix(middle, last)
    end = min((common.find(mark) for mark in marks if mark in common), default=None)
    if end is not None:
        while mark := next((mark for mark in marks if common.startswith(mark, end)), ""):
            end += len(mark)
        return (common[:end],)
    turn_ends = []
    for text in (middle, last):
        blanks = len(text) - len(text.lstrip())
        mark = next((mark for mark in marks if text.startswith(mark, blanks)), "")
        turn_ends += [text[: blanks + len(mark)]] if mark else []
    breaks_off = all(not rest[:1].isspace() and rest for rest in (middle[len(common) :], last[len(common) :]))
    if turn_ends or breaks_off or not common.strip():  # a common part of two different words does not end an answer
        return tuple(turn_ends)
    return (common.rstrip(),)


def _common_prefix(text: str, other: str) -> str:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    return "".join(char for char, _ in equal)
