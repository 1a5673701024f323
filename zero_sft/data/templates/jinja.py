"""Any chat template in Jinja: the conversation as text, and where the answers are in it.

Such templates may do anything, so nothing is assumed about them. A conversation is rendered twice, as it is and with a
stand-in for each answer: what is around the stand-ins must be around the answers, and what is between must be the answers, but
for white space at their ends; where it is not, the template is refused. Most templates write the same around any texts: then
what is around the stand-ins is put together from an earlier rendering, and only checked. No `{% generation %}` markers are
needed. What ends an answer, and what stands before it when the model begins to write, is found once a template, on a
conversation of two questions.

Thoughts, between `<think>` and `</think>` at the beginning of an answer, are given to the template where it takes them
(`thoughts`), and trained on where it keeps them; most drop those of earlier answers, as the model never sees them again.
"""

import contextlib
import re
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, USER, Conversation
from zero_sft.data.templates.completeness import require_all_shown, require_places
from zero_sft.data.templates.probe import STAND_IN, VICUNA_INSTEAD, TemplateFrame, render_chat
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.thoughts import CLOSE, OPEN, Answer, has_thoughts, kept_at, nothing_left, split_answer
from zero_sft.errors import DataError

_MOST_FRAMES, _LONGEST_FRAME = 1000, 1000
"""How many shapes of conversations are remembered, of how many messages at most: longer ones hardly come again."""

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
"""Templates by name, and the token that ends a turn in each, which a tokenizer must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationFrame:
    """What a template writes `around` the texts of a conversation, and which of these it has `shown`, in its order."""

    around: tuple[str, ...]
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A text of which the place is looked for: an answer's, or its thoughts where these have a field of the message."""

    turn: int
    text: str
    is_thoughts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedAnswers:
    """The spans of answers, and the rest of what `RenderedText` has of them."""

    spans: tuple[tuple[int, int], ...] = ()
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ChatTemplate:
    """A chat template of that `name`: the tokenizer's own, or where there is a `source`, that Jinja.

    Compared by identity, as the key of `_frames`.
    """

    tokenizer: Any  # PreTrainedTokenizerBase, whose stub hides methods behind a catch-all attribute
    name: str
    habits: TemplateFrame
    source: str | None = None
    adds_special_tokens = False  # chat templates write theirs themselves
    trains_on_blanks = False  # most of them strip texts, and of white space nothing would be left

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The texts that end an answer: one, or that of an answer in the middle and that of the last one."""
        return self.habits.stops

    def render(self, conversation: Conversation) -> RenderedText:
        """Render with the template, and find the answers.

        Raises:
            DataError: the template fails on this conversation, leaves out a text, rewrites its answers, or ends one with
                nothing.
        """
        text, located, trained = "", LocatedAnswers(), ()
        if conversation.turns:
            answers = self._answers(conversation)
            messages = [
                answers[number].message(turn.role) if number in answers else {"role": turn.role, "content": turn.text}
                for number, turn in enumerate(conversation.turns)
            ]
            text = self._apply(messages, conversation.where)
            frame = self._frame(messages)
            shown = None if frame is None else frame.shown
            require_places(shown, messages, conversation.where)
            located = self._locate(text, frame, messages, answers, conversation.where)
            spans = dict(zip(answers, located.spans, strict=True))
            require_all_shown(text, shown, messages, spans, conversation.where)
            trained = tuple(span for number, span in spans.items() if conversation.turns[number].trained)
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
        """The answers that have a text, by the number of their turn."""
        return {
            number: split_answer(turn.text, self.habits.thoughts, f"{conversation.where}, message {number + 1}")
            for number, turn in enumerate(conversation.turns)
            if turn.role == ASSISTANT and turn.text.strip()
        }

    def prompt(self, question: str) -> str:
        """The text after which the model writes its answer to one question.

        Raises:
            DataError: the template fails on it.
        """
        return self._apply([{"role": USER, "content": question}], "a prompt", prompt=True)

    def jinja(self, tokenizer: Any) -> Any:
        """The template itself."""
        return self.source or tokenizer.chat_template

    def _apply(self, messages: Sequence[Mapping[str, str]], where: str, *, prompt: bool = False) -> str:
        return render_chat(self.tokenizer, self.source, messages, where, prompt=prompt)

    def _locate(
        self,
        text: str,
        frame: ConversationFrame | None,
        messages: Sequence[Mapping[str, str]],
        answers: Mapping[int, Answer],
        where: str,
    ) -> LocatedAnswers:
        """The span of each answer.

        Worked example (ChatML, one answer "Hello."): with a stand-in the text is "...assistant\n", stand-in, "<|im_end|>\n".
        The text begins with the first of these, ends with the last, and between is "Hello."; the span is "Hello.<|im_end|>".
        """
        if not answers:
            return LocatedAnswers()
        # White space at a text's ends may be taken for the template's, or the other way round.
        is_plain = all(each["content"] == each["content"].strip() for each in messages)
        if is_plain and not any(each.thoughts for each in answers.values()):
            around = _assembled(frame, messages, answers)
            if around:
                pieces = [TextPiece(turn=number, text=each.text) for number, each in answers.items()]
                with contextlib.suppress(DataError):  # a template that looks at the texts: it is asked again, with these
                    return self._fitted(text, around, pieces, answers, where)
        around, pieces = self._rendered(messages, answers, where)
        return self._fitted(text, around, pieces, answers, where)

    def _rendered(
        self, messages: Sequence[Mapping[str, str]], answers: Mapping[int, Answer], where: str
    ) -> tuple[list[str], list[TextPiece]]:
        """What is around the answers when stand-ins are in their places, one text more than there are pieces, and these.

        Thoughts in a field have a stand-in, too; where the template leaves them out, they are no piece.
        """
        word = _unused(messages)
        replaced = [dict(message) for message in messages]
        for number, each in answers.items():
            stand_in = f"{word}{number}{word}"
            replaced[number]["content"] = stand_in if each.field else each.content.removesuffix(each.text) + stand_in
            if each.field:
                replaced[number][each.field] = f"{word}{number}t{word}"
        around = re.split(rf"{word}(\d+t?){word}", self._apply(replaced, where))
        pieces = [
            TextPiece(turn=number, text=each.thoughts if name.endswith("t") else each.text, is_thoughts=name.endswith("t"))
            for name in around[1::2]
            if (each := answers.get(number := int(name.removesuffix("t")))) is not None
        ]
        found = [each.turn for each in pieces if not each.is_thoughts]
        thoughts = [place for place, each in enumerate(pieces) if each.is_thoughts]
        is_in_order = all(pieces[place + 1 : place + 2] and pieces[place + 1].turn == pieces[place].turn for place in thoughts)
        if found != list(answers) or not is_in_order or any(pieces[place + 1].is_thoughts for place in thoughts):
            raise _unmaskable(where, next(iter(answers)), answers)
        return around[::2], pieces

    def _frame(self, messages: Sequence[Mapping[str, str]]) -> ConversationFrame | None:
        """What is around the texts of conversations of such a shape; None where the template can't render stand-ins."""
        shape = tuple((each["role"], bool(each["content"])) for each in messages)
        known = _frames.setdefault(self, {})
        if shape in known:
            return known[shape]
        word, frame = STAND_IN, None
        stand_ins = [{"role": role, "content": f"{word}{n}{word}" if text else ""} for n, (role, text) in enumerate(shape)]
        with contextlib.suppress(DataError):
            around = re.split(rf"{word}(\d+){word}", self._apply(stand_ins, "a conversation"))
            frame = ConversationFrame(around=tuple(around[::2]), shown=tuple(map(int, around[1::2])))
        if len(known) < _MOST_FRAMES and len(shape) <= _LONGEST_FRAME:
            known[shape] = frame
        return frame

    def _fitted(
        self, text: str, around: Sequence[str], pieces: Sequence[TextPiece], answers: Mapping[int, Answer], where: str
    ) -> LocatedAnswers:
        """The spans of the answers, if the whole text is what is around them and they."""
        if not text.startswith(around[0]):
            raise _unmaskable(where, pieces[0].turn, answers)
        spans, ends, kept = [], [], 0
        end, start, opened = 0, len(around[0]), None
        for piece, after in zip(pieces, around[1:], strict=True):
            length = _length_of_body(text, start, piece.text, after, is_last=piece is pieces[-1])
            if length is None:
                raise _unmaskable(where, piece.turn, answers)
            if piece.is_thoughts:
                opened = end + _after_prompt(text[end:start], self.habits.prompt)
                kept += 1
                start += length + len(after)
                continue
            begin = opened
            if begin is None:
                answer, before = answers[piece.turn], text[end:start]
                thoughts = "" if answer.field else answer.thoughts
                place = kept_at(before, thoughts) if thoughts else None
                if OPEN in thoughts.replace(OPEN, "", 1) and thoughts.strip() not in before:
                    raise _unmaskable(where, piece.turn, answers)  # templates take what follows the last "<think>" for them
                kept += place is not None and has_thoughts(answer)
                begin = end + _begin(before, len(before) if place is None else place, self.habits.prompt)
            end, opened = start + length, None
            if not text[begin:end].strip():
                raise nothing_left(f"{where}, message {piece.turn + 1}")
            spans.append((begin, end + self._length_of_stop(after, where)))
            ends.append((piece.turn, spans[-1][1]))
            start = end + len(after)
        thoughts = sum(map(has_thoughts, answers.values()))
        return LocatedAnswers(spans=tuple(spans), ends=tuple(ends), thoughts=thoughts, dropped_thoughts=thoughts - kept)

    def _length_of_stop(self, after: str, where: str) -> int:
        for stop in self.habits.stops:
            if after.startswith(stop):
                return len(stop)
        raise DataError(
            f"{where}: the chat template puts nothing after an answer that tells its end, so the model could not learn to stop."
            " Write {{ eos_token }} there, and see that the tokenizer has the template's special tokens; or give another.",
            code="data.template_without_turn_end",
        )


_frames: MutableMapping[ChatTemplate, dict[tuple[tuple[str, bool], ...], ConversationFrame | None]] = (
    weakref.WeakKeyDictionary()
)
"""The frames that `ChatTemplate._frame` has found in this process, by shape; a template's go when the template goes."""


def _assembled(
    frame: ConversationFrame | None, messages: Sequence[Mapping[str, str]], answers: Mapping[int, Answer]
) -> list[str] | None:
    """`ChatTemplate._rendered`, without rendering: from what the template writes around all texts of any such conversation."""
    filled = [number for number, each in enumerate(messages) if each["content"]]
    if frame is None or list(frame.shown) != filled:
        return None
    around = [[frame.around[0]]]
    for number, literal in zip(filled, frame.around[1:], strict=True):
        if number in answers:
            around.append([literal])
        else:
            around[-1] += [messages[number]["content"], literal]
    return ["".join(each) for each in around]


def _length_of_body(text: str, start: int, answer: str, after: str, *, is_last: bool) -> int | None:
    """How long an answer is that stands in `text` at `start`, followed by `after`; white space at its ends may be gone."""
    for body in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
        end = start + len(body)
        if text.startswith(body, start) and text.startswith(after, end) and (not is_last or end + len(after) == len(text)):
            return len(body)
    return None


def _begin(before: str, start: int, prompt: str) -> int:
    """Where the model begins to write, in what stands between the last answer and this one, thoughts included.

    `start`: where the thoughts begin, or the answer if there are none. White space that follows the prompt is its own: most
    tokenizers join it with the first word.
    """
    if not prompt:
        return len(before[:start].rstrip())
    place = before.rfind(prompt, 0, start + len(prompt))  # not in the thoughts
    first = place + len(prompt)
    return first if place >= 0 and (first > start or not before[first:start].strip()) else start


def _after_prompt(before: str, prompt: str) -> int:
    """Where the model begins to write thoughts for which the template has words of its own, in what stands before them."""
    place = before.rfind(prompt) if prompt else -1
    return place + len(prompt) if place >= 0 else len(before.rstrip())


def _unused(messages: Sequence[Mapping[str, str]]) -> str:
    """A word that is in no message, and that no template looks for, strips or escapes."""
    word = STAND_IN
    while any(word in value for message in messages for value in message.values()):
        word += "r"
    return word


def _unmaskable(where: str, index: int, answers: Mapping[int, Answer]) -> DataError:
    message = f"{where}, message {index + 1}: the chat template rewrites the turns of this conversation, so it can't be told "
    message += "surely which part of its text is the assistant's answer. "
    if index in answers and CLOSE in answers[index].content:
        message += f"The answer has {CLOSE} in it, which the template may look for. "
    return DataError(message + VICUNA_INSTEAD, code="data.template_rewrites_turns")
