"""Render conversations with any chat template in Jinja, and locate the answers in the text.

Such templates may do anything, so nothing is assumed about them. A conversation is rendered as it is, and compared with a
rendering in which stand-ins replace the answers. The text around the stand-ins must also surround the answers, and the text in
between must be the answers, except for white space at their ends; otherwise the template is refused.

Most templates write the same text around all conversations of one shape. So the first comparison is with a rendering of that
shape in which stand-ins replace all messages; it is kept, and made once per shape. Only if that text does not match, the
conversation itself is rendered with stand-ins for its answers.

`{% generation %}` markers are not needed. The text that ends an answer, and the generation prompt before it, are found once
per template, with a conversation of two questions.

Thoughts, between `<think>` and `</think>` at the beginning of an answer, are passed to the template in the form that it takes
(`thoughts`). They are trained on if the template keeps them; most templates drop those of earlier answers, since the model
never sees them again.
"""

import contextlib
import re
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, USER, Conversation
from zero_sft.data.templates.completeness import require_all_shown, require_places
from zero_sft.data.templates.probe import STAND_IN, VICUNA_INSTEAD, TemplateTraits, render_chat
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.thoughts import CLOSE, OPEN, Answer, empty_answer_error, find_thoughts, has_thoughts, split_answer
from zero_sft.errors import DataError

_MOST_FRAMES, _LONGEST_FRAME = 1000, 1000
"""The largest number of cached conversation shapes, and of messages in one; longer conversations hardly ever recur."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
NAMED = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>")}
"""Templates by name, each with the token that ends a turn; the tokenizer must have this token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsAround:
    """The text that a template writes `around` the messages of a conversation, and the indices of the messages `shown`.

    `shown` is in the template's order; `around` has one text more than `shown`.
    """

    around: tuple[str, ...]
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A text to locate: an answer, or its thoughts if the message has a field for them."""

    turn: int
    text: str
    is_thoughts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedAnswers:
    """The spans of the answers, and the other fields of `RenderedText` that follow from them."""

    spans: tuple[tuple[int, int], ...] = ()
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ChatTemplate:
    """A chat template: the Jinja `source`, or the tokenizer's template if there is no `source`.

    Compared by identity, since it is the key of `_frames`.
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
        text, located, trained = "", LocatedAnswers(), ()
        if conversation.turns:
            answers = self._answers(conversation)
            messages = [
                answers[index].message(turn.role) if index in answers else {"role": turn.role, "content": turn.text}
                for index, turn in enumerate(conversation.turns)
            ]
            text = self._apply(messages, conversation.where)
            frame = self._frame(messages)
            shown = None if frame is None else frame.shown
            require_places(shown, messages, conversation.where)
            located = self._locate(text, frame, messages, answers, conversation.where)
            spans = dict(zip(answers, located.spans, strict=True))
            require_all_shown(text, shown, messages, spans, conversation.where)
            trained = tuple(span for index, span in spans.items() if not conversation.turns[index].left_out_of_loss)
        return RenderedText(
            text=text,
            spans=trained,
            where=conversation.where,
            adds_special_tokens=self.adds_special_tokens,
            ends=located.ends,
            thoughts=located.thoughts,
            dropped_thoughts=located.dropped_thoughts,
        )

    def _answers(self, conversation: Conversation) -> dict[int, Answer]:
        """Return the answers with a text, by the index of their turn."""
        return {
            index: split_answer(turn.text, self.traits.thoughts, f"{conversation.where}, message {index + 1}")
            for index, turn in enumerate(conversation.turns)
            if turn.role == ASSISTANT and turn.text.strip()
        }

    def prompt(self, question: str) -> str:
        """Render one question and the generation prompt, after which the model writes its answer.

        Raises:
            DataError: the template fails on it.
        """
        return self._apply([{"role": USER, "content": question}], "a prompt", generation_prompt=True)

    def jinja(self, tokenizer: Any) -> Any:
        """Return the Jinja source of the template."""
        return self.source or tokenizer.chat_template

    def _apply(self, messages: Sequence[Mapping[str, str]], where: str, *, generation_prompt: bool = False) -> str:
        return render_chat(self.tokenizer, self.source, messages, where, generation_prompt=generation_prompt)

    def _locate(
        self,
        text: str,
        frame: TextsAround | None,
        messages: Sequence[Mapping[str, str]],
        answers: Mapping[int, Answer],
        where: str,
    ) -> LocatedAnswers:
        """Locate the span of each answer.

        Worked example (ChatML, one answer "Hello."): with a stand-in the text is "...assistant\n", stand-in, "<|im_end|>\n".
        The text begins with the first of these, ends with the last, and between is "Hello."; the span is "Hello.<|im_end|>".
        """
        if not answers:
            return LocatedAnswers()
        # White space at a text's ends could belong to the text or to the template.
        is_stripped = all(message["content"] == message["content"].strip() for message in messages)
        if is_stripped and not any(answer.thoughts for answer in answers.values()):
            around = _around_from_frame(frame, messages, answers)
            if around:
                pieces = [TextPiece(turn=index, text=answer.text) for index, answer in answers.items()]
                with contextlib.suppress(DataError):  # the template depends on the texts, so render these with stand-ins
                    return self._match(text, around, pieces, answers, where)
        around, pieces = self._render_stand_ins(messages, answers, where)
        return self._match(text, around, pieces, answers, where)

    def _render_stand_ins(
        self, messages: Sequence[Mapping[str, str]], answers: Mapping[int, Answer], where: str
    ) -> tuple[list[str], list[TextPiece]]:
        """Render the messages with stand-ins for the answers; return the texts around the stand-ins, and the pieces to find.

        There is one text more than pieces. Thoughts in a field get a stand-in as well; if the template leaves them out, there
        is no piece for them.
        """
        word = _unused_word(messages)
        replaced = [dict(message) for message in messages]
        for index, answer in answers.items():
            stand_in = f"{word}{index}{word}"
            replaced[index]["content"] = stand_in if answer.field else answer.content.removesuffix(answer.text) + stand_in
            if answer.field:
                replaced[index][answer.field] = f"{word}{index}t{word}"
        around = re.split(rf"{word}(\d+t?){word}", self._apply(replaced, where))
        pieces = [
            TextPiece(turn=index, text=answer.thoughts if name.endswith("t") else answer.text, is_thoughts=name.endswith("t"))
            for name in around[1::2]
            if (answer := answers.get(index := int(name.removesuffix("t")))) is not None
        ]
        shown_answers = [piece.turn for piece in pieces if not piece.is_thoughts]
        thoughts = [i for i, piece in enumerate(pieces) if piece.is_thoughts]
        is_in_order = all(pieces[i + 1 : i + 2] and pieces[i + 1].turn == pieces[i].turn for i in thoughts)
        if shown_answers != list(answers) or not is_in_order or any(pieces[i + 1].is_thoughts for i in thoughts):
            raise _rewriting_error(where, next(iter(answers)), answers)
        return around[::2], pieces

    def _frame(self, messages: Sequence[Mapping[str, str]]) -> TextsAround | None:
        """Return the frame of all conversations of this shape, from the cache; None if the template rejects stand-ins."""
        shape = tuple((message["role"], bool(message["content"])) for message in messages)
        cached = _frames.setdefault(self, {})
        if shape in cached:
            return cached[shape]
        word, frame = STAND_IN, None
        stand_ins = [{"role": role, "content": f"{word}{n}{word}" if text else ""} for n, (role, text) in enumerate(shape)]
        with contextlib.suppress(DataError):
            around = re.split(rf"{word}(\d+){word}", self._apply(stand_ins, "a conversation"))
            frame = TextsAround(around=tuple(around[::2]), shown=tuple(map(int, around[1::2])))
        if len(cached) < _MOST_FRAMES and len(shape) <= _LONGEST_FRAME:
            cached[shape] = frame
        return frame

    def _match(
        self, text: str, around: Sequence[str], pieces: Sequence[TextPiece], answers: Mapping[int, Answer], where: str
    ) -> LocatedAnswers:
        """Locate the answers' spans in a text that must consist of exactly the `around` texts and the pieces between them.

        Raises:
            DataError: the text is something else, or an answer is empty or without an end.
        """
        if not text.startswith(around[0]):
            raise _rewriting_error(where, pieces[0].turn, answers)
        spans, ends, kept = [], [], 0
        end, start, thoughts_begin = 0, len(around[0]), None
        for piece, after in zip(pieces, around[1:], strict=True):
            length = _match_length(text, start, piece.text, after, is_last=piece is pieces[-1])
            if length is None:
                raise _rewriting_error(where, piece.turn, answers)
            if piece.is_thoughts:
                thoughts_begin = end + _after_prompt(text[end:start], self.traits.generation_prompt)
                kept += 1
                start += length + len(after)
                continue
            begin = thoughts_begin
            if begin is None:
                answer, before = answers[piece.turn], text[end:start]
                thoughts = "" if answer.field else answer.thoughts
                position = find_thoughts(before, thoughts) if thoughts else None
                if OPEN in thoughts.replace(OPEN, "", 1) and thoughts.strip() not in before:
                    # templates take the text after the last "<think>" for the thoughts
                    raise _rewriting_error(where, piece.turn, answers)
                kept += position is not None and has_thoughts(answer)
                begin = end + _begin(before, len(before) if position is None else position, self.traits.generation_prompt)
            end, thoughts_begin = start + length, None
            if not text[begin:end].strip():
                raise empty_answer_error(f"{where}, message {piece.turn + 1}")
            spans.append((begin, end + self._turn_end_length(after, where)))
            ends.append((piece.turn, spans[-1][1]))
            start = end + len(after)
        thoughts = sum(map(has_thoughts, answers.values()))
        return LocatedAnswers(spans=tuple(spans), ends=tuple(ends), thoughts=thoughts, dropped_thoughts=thoughts - kept)

    def _turn_end_length(self, after: str, where: str) -> int:
        for turn_end in self.traits.turn_ends:
            if after.startswith(turn_end):
                return len(turn_end)
        raise DataError(
            f"{where}: the chat template writes nothing that marks the end of an answer, so the model could not learn to stop."
            " Write {{ eos_token }} after answers and check that the tokenizer has the template's special tokens, or give"
            " --chat_template another template.",
            code="data.template_without_turn_end",
        )


_frames: MutableMapping[ChatTemplate, dict[tuple[tuple[str, bool], ...], TextsAround | None]] = weakref.WeakKeyDictionary()
"""Cache of `ChatTemplate._frame` in this process, by shape. A template's frames are freed together with the template."""


def _around_from_frame(
    frame: TextsAround | None, messages: Sequence[Mapping[str, str]], answers: Mapping[int, Answer]
) -> list[str] | None:
    """Build the texts around the answers from the cached frame of the conversation's shape, without rendering.

    None if there is no frame, or if the template shows the messages in another order.
    """
    filled = [index for index, message in enumerate(messages) if message["content"]]
    if frame is None or list(frame.shown) != filled:
        return None
    around = [[frame.around[0]]]
    for index, literal in zip(filled, frame.around[1:], strict=True):
        if index in answers:
            around.append([literal])
        else:
            around[-1] += [messages[index]["content"], literal]
    return ["".join(parts) for parts in around]


def _match_length(text: str, start: int, answer: str, after: str, *, is_last: bool) -> int | None:
    """Return the length of the answer at `start`, followed by `after`, perhaps stripped of white space; None if not there."""
    for body in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
        end = start + len(body)
        if text.startswith(body, start) and text.startswith(after, end) and (not is_last or end + len(after) == len(text)):
            return len(body)
    return None


def _begin(before: str, start: int, prompt: str) -> int:
    """Find where the model begins to write, in the text between the previous answer and this one, thoughts included.

    `start` is where the thoughts begin, or the answer if there are none. White space after the prompt belongs to the model's
    text, since most tokenizers join it with the first word.
    """
    if not prompt:
        return len(before[:start].rstrip())
    position = before.rfind(prompt, 0, start + len(prompt))  # not inside the thoughts
    first = position + len(prompt)
    return first if position >= 0 and (first > start or not before[first:start].strip()) else start


def _after_prompt(before: str, prompt: str) -> int:
    """Find where the model begins to write, in the text before thoughts that the template reads from a field."""
    position = before.rfind(prompt) if prompt else -1
    return position + len(prompt) if position >= 0 else len(before.rstrip())


def _unused_word(messages: Sequence[Mapping[str, str]]) -> str:
    """Make a stand-in that occurs in no message, and that templates neither look for nor strip nor escape."""
    word = STAND_IN
    while any(word in value for message in messages for value in message.values()):
        word += "r"
    return word


def _rewriting_error(where: str, index: int, answers: Mapping[int, Answer]) -> DataError:
    message = f"{where}, message {index + 1}: the chat template rewrites the turns of this conversation, so the assistant's "
    message += "answer can't be located reliably in its text. "
    if index in answers and CLOSE in answers[index].content:
        message += f"The answer contains {CLOSE}, which the template may treat specially. "
    return DataError(message + VICUNA_INSTEAD, code="data.template_rewrites_turns")
