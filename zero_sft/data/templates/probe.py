"""Render with a chat template, and probe with a conversation of two questions what it writes around answers."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, THOUGHTS_FIELDS, USER, Messages
from zero_sft.data.templates.calls import CallHandling, common_prefix, probe_calls
from zero_sft.data.templates.chat import Chat
from zero_sft.data.templates.render import VICUNA_INSTEAD, has_marks, render_chat
from zero_sft.data.templates.stand_ins import STAND_IN
from zero_sft.data.templates.thoughts import CLOSE, OPEN, ThoughtsHandling
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """The text that a template writes around answers.

    `generation_prompt` comes before an answer. `turn_ends` are the texts that may end one, the usual one first; the model must
    write them itself. `thoughts` tells how the template handles the thoughts of an answer, and `calls` calls of tools.
    `has_marks`: the template itself marks what the assistant writes, with `{% generation %}`.
    """

    generation_prompt: str
    turn_ends: tuple[str, ...]
    thoughts: ThoughtsHandling
    calls: CallHandling
    has_marks: bool


def probe_template(tokenizer: Any, source: str | None, variables: Mapping[str, Any] | None = None) -> TemplateTraits:
    """Find out what a template writes around answers, from one open question and two answered ones; raises `DataError`.

    `variables` are those that a sample sets for the template.
    """
    variables, where = variables or {}, "two questions and answers"
    question, answer = {"role": USER, "content": "question"}, {"role": ASSISTANT}
    unprompted = render_chat(tokenizer, source, Chat(messages=[question], variables=variables), where)
    prompted = render_chat(tokenizer, source, Chat(messages=[question], variables=variables), where, generation_prompt=True)
    word = STAND_IN
    chat = [question, {**answer, "content": f"{word}0"}, {**question, "content": f"{word}1"}, {**answer, "content": f"{word}2"}]
    parts = re.split(rf"{word}\d", render_chat(tokenizer, source, Chat(messages=chat, variables=variables), where))
    if len(parts) != len(chat):
        raise DataError(
            f"the chat template leaves out or changes texts (tried with {where}), so answers can't be located. It has to "
            f"write message['content'] unchanged. {VICUNA_INSTEAD}",
            code="data.template_changes_texts",
        )
    marks = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
    turn_ends = find_turn_ends(parts[1], parts[3], marks)
    prompt = prompted[len(common_prefix(unprompted, prompted)) :]
    if not prompt:  # some templates always write the prompt, so it follows the last answer as well
        rest = parts[3].removeprefix(next((turn_end for turn_end in turn_ends if parts[3].startswith(turn_end)), ""))
        prompt = rest.lstrip()

    def render(messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        with contextlib.suppress(DataError):
            return render_chat(tokenizer, source, Chat(messages=messages, tools=tools, variables=variables), "a probe")
        return ""

    return TemplateTraits(
        generation_prompt=prompt,
        turn_ends=turn_ends,
        thoughts=_probe_thoughts(render),
        calls=probe_calls(render, turn_ends, marks),
        has_marks=has_marks(str(source or tokenizer.chat_template)),
    )


def _probe_thoughts(render: Callable[[Messages], str]) -> ThoughtsHandling:
    """Find out how a template takes thoughts, from two answers with thoughts."""
    word = STAND_IN
    inner = [f"{word}0", f"{word}1"]  # without the line ends that templates write around thoughts
    blocks = [f"{OPEN}{thoughts} {CLOSE}{word}" for thoughts in inner]
    as_text = _render_answers(render, [{"content": block} for block in blocks])
    is_parsed = any(block not in as_text for block in blocks)
    for name in THOUGHTS_FIELDS:
        from_field = _render_answers(render, [{"content": word, name: thoughts} for thoughts in inner])
        if inner[-1] in from_field:
            if "".join(from_field.split()) == "".join(as_text.split()):
                return ThoughtsHandling(is_parsed=is_parsed)
            return ThoughtsHandling(field=name)
    return ThoughtsHandling(is_parsed=is_parsed, writes_block=not is_parsed and as_text.count(CLOSE) > len(blocks))


def _render_answers(render: Callable[[Messages], str], answers: Sequence[Mapping[str, str]]) -> str:
    """Render the answers, each after a question; return an empty text if the template can't."""
    question = {"role": USER, "content": "question"}
    return render([message for answer in answers for message in (question, {"role": ASSISTANT, **answer})])


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
    common = common_prefix(middle, last)
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
