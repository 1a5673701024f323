"""Render conversations with any chat template in Jinja, and locate the answers in the text.

Such templates may do anything, so nothing is assumed about them. A conversation is rendered as it is. The text around the
answers comes from a second rendering, with stand-ins. The same text must surround the answers, and the text in between must be
the answers, except for white space at their ends; otherwise the template is refused.

Most templates write the same text around all conversations of one shape. So the first try is a rendering of that shape in which
stand-ins replace all messages; it is made once per shape, and cached. Only if that text does not match, the conversation itself
is rendered with stand-ins for its answers alone.

`{% generation %}` markers are not needed. Where a template has them, they say what is trained on in an answer. The text that
ends an answer, and the generation prompt before it, are found once per template, with a conversation of two questions.

Thoughts, between `<think>` and `</think>` at the beginning of an answer, are passed to the template in the form that it takes
(`thoughts`). They are trained on if the template keeps them; most templates drop those of earlier answers, since the model
never sees them again.

Calls of tools are written by the template, but the model has to write them, so everything from the generation prompt to the end
of such an answer is trained on. For the second rendering, stand-ins replace the names and the texts in the arguments.
"""

import contextlib
import functools
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, USER, Conversation, Messages
from zero_sft.data.templates.chat import DEFAULT_FORM, Chat, chat_of
from zero_sft.data.templates.completeness import require_all_shown, require_place_for_calls, require_places, require_tools
from zero_sft.data.templates.locate import LocatedAnswers, locate_answers, rewriting_error
from zero_sft.data.templates.probe import TemplateTraits, probe_template
from zero_sft.data.templates.render import marked_spans, render_chat
from zero_sft.data.templates.rendered import RenderedText, TrainedSpans
from zero_sft.data.templates.stand_ins import STAND_IN, TextPiece, around_stand_ins
from zero_sft.data.templates.thoughts import Answers, split_answer
from zero_sft.errors import DataError

_TAGGED_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsAround:
    """The text that a template writes `around` the messages of a conversation, and the indices of the messages `shown`.

    `shown` is in the template's order; `around` has one text more than `shown`.
    """

    around: tuple[str, ...]
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChatTemplate:
    """A chat template: the Jinja `source`, or the tokenizer's template if there is no `source`.

    Compared by identity, since it is a key of the cache of `_texts_around`.
    """

    tokenizer: Any  # PreTrainedTokenizerBase, whose stub hides methods behind a catch-all attribute
    name: str
    traits: TemplateTraits
    source: str | None = None
    adds_special_tokens = False  # chat templates write special tokens themselves
    trains_on_blanks = False  # most templates strip texts, so nothing of white space would be left

    def unused_variables(self, conversation: Conversation) -> list[str]:
        """Return the names of a conversation's variables that do not occur in the template."""
        source, variables = str(self.jinja(self.tokenizer)), json.loads(conversation.template_kwargs or "{}")
        return [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", source)]

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The texts that end an answer: one, or two if answers in the middle and the last answer end differently."""
        return self.traits.turn_ends

    def render(self, conversation: Conversation) -> RenderedText:
        """Render with the template, and locate the answers.

        Raises:
            DataError: the template fails on this conversation, leaves out a text, rewrites an answer, or writes nothing that
                ends an answer.
        """
        conversation = self._without_tags_of_results(conversation)
        turns, where = conversation.turns, conversation.where
        if not turns:
            return RenderedText(text="")
        traits = _traits_with(self, conversation.template_kwargs)
        answers = {
            index: split_answer(turn, traits.thoughts, f"{where}, message {index + 1}")
            for index, turn in enumerate(turns)
            if turn.role == ASSISTANT and (turn.text.strip() or turn.thoughts or turn.calls)
        }
        require_place_for_calls(conversation, traits.calls)
        chat = chat_of(conversation, answers, traits.calls.form or DEFAULT_FORM)
        text = self.apply(chat, where)
        has_calls = any(turn.calls for turn in turns)
        shape = tuple((message["role"], bool(message["content"])) for message in chat.messages)
        # the text around a tool's turn may depend on the call before it
        usual = None if has_calls else _texts_around(self, shape, conversation.tools, conversation.template_kwargs)
        shown = usual and usual.shown
        require_places(shown, chat.messages, where)
        located = self._locate(text, usual, chat, answers, traits, where)
        spans = dict(zip(answers, located.spans, strict=True))
        require_all_shown(text, shown, chat.messages, spans, where)
        require_tools(text, spans, conversation)
        marked = marked_spans(self.tokenizer, self.jinja(self.tokenizer), chat, where) if traits.has_marks else None
        trained = TrainedSpans()
        for index, (start, stop), body in zip(answers, located.spans, located.bodies, strict=True):
            pieces = [(start, stop)] if marked is None else [mark for mark in marked if mark[0] < stop and mark[1] > start]
            if turns[index].trained_ranges is not None and (answers[index].thoughts or turns[index].calls):
                raise DataError(
                    f"{where}, message {index + 1}: `train_detail` marks parts of an answer that has thoughts or calls. Remove "
                    "them, or the marks.",
                    code="data.ranges_next_to_thoughts",
                )
            trained = trained.with_answer(turns[index], pieces, body, text, conversation.weight)
        return RenderedText(
            text=text,
            **trained.fields(),
            ends=located.ends,
            thoughts=located.thoughts,
            dropped_thoughts=located.dropped_thoughts,
        )

    def _without_tags_of_results(self, conversation: Conversation) -> Conversation:
        """Remove the tags around the results of tools that the template writes itself; Hermes' data has them in the text."""
        results = [_TAGGED_RESULT.fullmatch(turn.text) if turn.role == TOOL else None for turn in conversation.turns]
        if not any(results) or "<tool_response>" not in str(self.jinja(self.tokenizer)):
            return conversation
        turns = (
            replace(turn, text=found[1]) if found else turn for turn, found in zip(conversation.turns, results, strict=True)
        )
        return replace(conversation, turns=tuple(turns))

    def prompt(self, question: str) -> str:
        """Render one question and the generation prompt, after which the model writes its answer."""
        return self.apply(Chat(messages=[{"role": USER, "content": question}]), "a prompt", generation_prompt=True)

    def jinja(self, tokenizer: Any) -> Any:
        """Return the Jinja source of the template."""
        return self.source or tokenizer.chat_template

    def apply(self, chat: Chat, where: str, *, generation_prompt: bool = False) -> str:
        """Render a chat; raises as `render_chat` does."""
        return render_chat(self.tokenizer, self.source, chat, where, generation_prompt=generation_prompt)

    def _locate(
        self, text: str, usual: TextsAround | None, chat: Chat, answers: Answers, traits: TemplateTraits, where: str
    ) -> LocatedAnswers:
        """Locate the span of each answer, with the `usual` texts around conversations of this shape, or else with its own.

        Worked example (ChatML, one answer "Hello."): with a stand-in the text is "...assistant\n", stand-in, "<|im_end|>\n".
        The text begins with the first of these, ends with the last, and between is "Hello."; the span is "Hello.<|im_end|>".
        """
        if not answers:
            return LocatedAnswers()
        # White space at a text's ends could belong to the text or to the template.
        messages = chat.messages
        is_stripped = usual is not None and all(message["content"] == message["content"].strip() for message in messages)
        if is_stripped and not any(answer.thoughts for answer in answers.values()):
            around = _around_answers(usual, messages, answers)
            if around:
                pieces = [TextPiece(turn=index, text=answer.text) for index, answer in answers.items()]
                with contextlib.suppress(DataError):  # the template depends on the texts, so render these with stand-ins
                    return locate_answers(text, around, pieces, answers, traits, where)
        found = around_stand_ins(chat, answers, lambda replaced: self.apply(replaced, where))
        if found is None:
            raise rewriting_error(where, next(iter(answers)), answers, has_calls=chat.has_tools)
        headers = {} if traits.generation_prompt else self._headers(chat)
        return locate_answers(text, *found, answers, traits, where, headers=headers)

    def _headers(self, chat: Chat) -> dict[int, str]:
        """Return what a template without a generation prompt writes between a message and the calls after it.

        By the index of the message with calls. It is found with a text in place of the calls, in the conversation up to there.
        """
        headers = {}
        for index, message in enumerate(chat.messages):
            if "tool_calls" in message and index:
                with contextlib.suppress(DataError):
                    messages = [*chat.messages[:index], {"role": ASSISTANT, "content": STAND_IN}]
                    before, _, _ = self.apply(chat.with_messages(messages), "a conversation").partition(STAND_IN)
                    _, content, header = before.rpartition(chat.messages[index - 1]["content"])
                    headers |= {index: header} if content and header else {}
        return headers


@functools.lru_cache(maxsize=20)
def _traits_with(template: ChatTemplate, variables: str) -> TemplateTraits:
    """Return the template's traits with the variables that a sample sets, in JSON. The process keeps the latest."""
    if not variables:
        return template.traits
    return probe_template(template.tokenizer, template.source, json.loads(variables))


@functools.lru_cache(maxsize=500)
def _texts_around(
    template: ChatTemplate, shape: tuple[tuple[str, bool], ...], tools: str, variables: str
) -> TextsAround | None:
    """Render stand-ins for all messages of a conversation without calls; None if the template rejects them.

    `shape` has the role of each message, and whether it has a text; `tools` and `variables` are JSON. The process keeps the
    latest; nobody clears it.
    """
    word = STAND_IN
    stand_ins = [{"role": role, "content": f"{word}{n}{word}" if text else ""} for n, (role, text) in enumerate(shape)]
    chat = Chat(messages=stand_ins, tools=json.loads(tools or "null"), variables=json.loads(variables or "{}"))
    with contextlib.suppress(DataError):
        around = re.split(rf"{word}(\d+){word}", template.apply(chat, "a conversation"))
        return TextsAround(around=tuple(around[::2]), shown=tuple(map(int, around[1::2])))
    return None


def _around_answers(usual: TextsAround | None, messages: Messages, answers: Answers) -> list[str] | None:
    """Build the texts around the answers from those around all messages, without rendering.

    None if there are none, or if the template shows the messages in another order.
    """
    filled = [index for index, message in enumerate(messages) if message["content"]]
    if usual is None or list(usual.shown) != filled:
        return None
    around = [[usual.around[0]]]
    for index, literal in zip(filled, usual.around[1:], strict=True):
        if index in answers:
            around.append([literal])
        else:
            around[-1] += [messages[index]["content"], literal]
    return ["".join(parts) for parts in around]
