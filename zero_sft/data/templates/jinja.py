"""Render conversations with any chat template in Jinja, and locate the answers in the text.

Such templates may do anything, so nothing is assumed about them. A conversation is rendered as it is. The text around the
answers comes from a second rendering, with stand-ins. The same text must surround the answers, and the text in between must be
the answers, except for white space at their ends; otherwise the template is refused.

Most templates write the same text around all conversations of one shape. So the first try is a rendering of that shape in which
stand-ins replace all messages; it is made once per shape, and cached. Only if that text does not match, the conversation itself
is rendered with stand-ins for its answers alone.

`{% generation %}` markers are not needed. The text that ends an answer, and the generation prompt before it, are found once
per template, with a conversation of two questions.

Thoughts, between `<think>` and `</think>` at the beginning of an answer, are passed to the template in the form that it takes
(`thoughts`). They are trained on if the template keeps them; most templates drop those of earlier answers, since the model
never sees them again.
"""

import contextlib
import functools
import re
from dataclasses import dataclass, replace
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, USER, Conversation, Messages
from zero_sft.data.templates.completeness import require_all_shown, require_places
from zero_sft.data.templates.locate import TextPiece, locate_answers, rewriting_error
from zero_sft.data.templates.probe import STAND_IN, TemplateTraits, render_chat
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.thoughts import Answers, split_answer
from zero_sft.errors import DataError


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
        turns, where = conversation.turns, conversation.where
        if not turns:
            return RenderedText(text="")
        answers = {
            index: split_answer(turn.text, self.traits.thoughts, f"{where}, message {index + 1}")
            for index, turn in enumerate(turns)
            if turn.role == ASSISTANT and turn.text.strip()
        }
        messages = [
            answers[index].message(turn.role) if index in answers else {"role": turn.role, "content": turn.text}
            for index, turn in enumerate(turns)
        ]
        text = self.apply(messages, where)
        usual = _texts_around(self, tuple((message["role"], bool(message["content"])) for message in messages))
        shown = usual and usual.shown
        require_places(shown, messages, where)
        located = self._locate(text, usual, messages, answers, where)
        spans = dict(zip(answers, located.spans, strict=True))
        require_all_shown(text, shown, messages, spans, where)
        return replace(located, spans=tuple(span for index, span in spans.items() if not turns[index].left_out_of_loss))

    def prompt(self, question: str) -> str:
        """Render one question and the generation prompt, after which the model writes its answer."""
        return self.apply([{"role": USER, "content": question}], "a prompt", generation_prompt=True)

    def jinja(self, tokenizer: Any) -> Any:
        """Return the Jinja source of the template."""
        return self.source or tokenizer.chat_template

    def apply(self, messages: Messages, where: str, *, generation_prompt: bool = False) -> str:
        """Render messages; raises as `render_chat` does."""
        return render_chat(self.tokenizer, self.source, messages, where, generation_prompt=generation_prompt)

    def _locate(self, text: str, usual: TextsAround | None, messages: Messages, answers: Answers, where: str) -> RenderedText:
        """Locate the span of each answer, with the `usual` texts around conversations of this shape, or else with its own.

        Worked example (ChatML, one answer "Hello."): with a stand-in the text is "...assistant\n", stand-in, "<|im_end|>\n".
        The text begins with the first of these, ends with the last, and between is "Hello."; the span is "Hello.<|im_end|>".
        """
        if not answers:
            return RenderedText(text=text)
        # White space at a text's ends could belong to the text or to the template.
        is_stripped = all(message["content"] == message["content"].strip() for message in messages)
        if is_stripped and not any(answer.thoughts for answer in answers.values()):
            around = _around_answers(usual, messages, answers)
            if around:
                pieces = [TextPiece(turn=index, text=answer.text) for index, answer in answers.items()]
                with contextlib.suppress(DataError):  # the template depends on the texts, so render these with stand-ins
                    return locate_answers(text, around, pieces, answers, self.traits, where)
        around, pieces = self._replace_answers(messages, answers, where)
        return locate_answers(text, around, pieces, answers, self.traits, where)

    def _replace_answers(self, messages: Messages, answers: Answers, where: str) -> tuple[list[str], list[TextPiece]]:
        """Render the messages with stand-ins for the answers; return the texts around the stand-ins, and the pieces to find.

        There is one text more than pieces. Thoughts in a field get a stand-in as well; if the template leaves them out, there
        is no piece for them.
        """
        word = STAND_IN
        while any(word in value for message in messages for value in message.values()):
            word += "r"
        replaced = [dict(message) for message in messages]
        for index, answer in answers.items():
            stand_in = f"{word}{index}{word}"
            replaced[index]["content"] = stand_in if answer.field else answer.content.removesuffix(answer.text) + stand_in
            if answer.field:
                replaced[index][answer.field] = f"{word}{index}t{word}"
        around = re.split(rf"{word}(\d+t?){word}", self.apply(replaced, where))
        names, pieces = around[1::2], []
        shown = frozenset(names)  # expected: each answer once, in order, right after its thoughts if they are shown
        expected = [name for index in answers for name in (f"{index}t", f"{index}")]
        if names != [name for name in expected if name in shown or name.isdecimal()]:
            raise rewriting_error(where, next(iter(answers)), answers)
        for name in names:
            index, is_thoughts = int(name.removesuffix("t")), name.endswith("t")
            text = answers[index].thoughts if is_thoughts else answers[index].text
            pieces.append(TextPiece(turn=index, text=text, is_thoughts=is_thoughts))
        return around[::2], pieces


@functools.lru_cache(maxsize=500)
def _texts_around(template: ChatTemplate, shape: tuple[tuple[str, bool], ...]) -> TextsAround | None:
    """Render stand-ins for all messages of a conversation; None if the template rejects them.

    `shape` has the role of each message, and whether it has a text. The process keeps the latest; nobody clears it.
    """
    word = STAND_IN
    stand_ins = [{"role": role, "content": f"{word}{n}{word}" if text else ""} for n, (role, text) in enumerate(shape)]
    with contextlib.suppress(DataError):
        around = re.split(rf"{word}(\d+){word}", template.apply(stand_ins, "a conversation"))
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
