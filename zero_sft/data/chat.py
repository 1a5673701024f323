"""Any chat template in Jinja: the conversation as text, and where the answers are in it.

Such templates may do anything, so nothing is assumed about them. A conversation is rendered twice, as it is and with a
stand-in for each answer: what is around the stand-ins must be around the answers, and what is between must be the answers, but
for white space at their ends; where it is not, the template is refused. Most templates write the same around any texts: then
what is around the stand-ins is put together from an earlier rendering, and only checked. No `{% generation %}` markers are
needed. What ends an answer, and what stands before it when the model begins to write, is found once a template, on a
conversation of two questions.

Thoughts, between `<think>` and `</think>` at the beginning of an answer, are trained on where the template keeps them; most
drop those of earlier answers, as the model never sees them again.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zero_sft.data.conversation import ASSISTANT, USER, Conversation
from zero_sft.data.habits import STAND_IN, VICUNA_INSTEAD, Habits, apply
from zero_sft.data.rendered import Rendered
from zero_sft.errors import DataError

_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_MOST_FRAMES = 1000

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
class Frame:
    """What a template writes `around` the texts of a conversation, and which of these it has `shown`, in its order."""

    around: tuple[str, ...]
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A chat template of that `name`: the tokenizer's own, or where there is a `source`, that Jinja."""

    tokenizer: Any  # PreTrainedTokenizerBase, whose stub hides methods behind a catch-all attribute
    name: str
    habits: Habits
    source: str | None = None
    frames: dict[tuple[tuple[str, bool], ...], Frame | None] = field(default_factory=dict, repr=False, compare=False)
    adds_special_tokens = False  # chat templates write theirs themselves

    def render(self, conversation: Conversation) -> Rendered:
        """Render with the template, and find the answers.

        Raises:
            DataError: the template fails on this conversation, leaves out a text, rewrites its answers, or ends one with
                nothing.
        """
        text, spans = "", ()
        if conversation.turns:
            messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
            text = self._apply(messages, conversation.where)
            frame = self._frame(messages)
            _require_all_shown(text, frame, messages, conversation.where)
            places = [number for number, turn in enumerate(conversation.turns) if turn.role == ASSISTANT and turn.text]
            found = self._locate(text, frame, messages, places, conversation.where)
            spans = tuple(span for number, span in zip(places, found, strict=True) if conversation.turns[number].trained)
        return Rendered(text=text, spans=spans, where=conversation.where, adds_special_tokens=self.adds_special_tokens)

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
        return apply(self.tokenizer, self.source, messages, where, prompt=prompt)

    def _locate(
        self, text: str, frame: Frame | None, messages: Sequence[Mapping[str, str]], places: Sequence[int], where: str
    ) -> list[tuple[int, int]]:
        """The span of each message in `places`.

        Worked example (ChatML, one answer "Hello."): with a stand-in the text is "...assistant\n", stand-in, "<|im_end|>\n".
        The text begins with the first of these, ends with the last, and between is "Hello."; the span is "Hello.<|im_end|>".
        """
        if not places:
            return []
        parts = [_split_thoughts(messages[number]["content"]) for number in places]
        # White space at a text's ends may be taken for the template's, or the other way round.
        if all(each["content"] == each["content"].strip() for each in messages) and not any(thoughts for thoughts, _ in parts):
            around = _assembled(frame, messages, places)
            if around:
                with contextlib.suppress(DataError):  # a template that looks at the texts: it is asked again, with these
                    return self._fitted(text, around, places, parts, where)
        return self._fitted(text, self._rendered(messages, places, parts, where), places, parts, where)

    def _rendered(
        self, messages: Sequence[Mapping[str, str]], places: Sequence[int], parts: Sequence[tuple[str, str]], where: str
    ) -> list[str]:
        """What is around the answers when stand-ins are in their places: one text more than there are answers."""
        word = _unused(messages)
        replaced = [dict(message) for message in messages]
        for number, (thoughts, _) in zip(places, parts, strict=True):
            replaced[number]["content"] = f"{thoughts}{word}{number}{word}"
        around = re.split(rf"{word}(\d+){word}", self._apply(replaced, where))
        if around[1::2] != [str(number) for number in places]:
            raise _unmaskable(where, places[0])
        return around[::2]

    def _frame(self, messages: Sequence[Mapping[str, str]]) -> Frame | None:
        """What is around the texts of conversations of such a shape; None where the template can't render stand-ins."""
        shape = tuple((each["role"], bool(each["content"])) for each in messages)
        if shape in self.frames:
            return self.frames[shape]
        word, frame = STAND_IN, None
        stand_ins = [{"role": role, "content": f"{word}{n}{word}" if text else ""} for n, (role, text) in enumerate(shape)]
        with contextlib.suppress(DataError):
            around = re.split(rf"{word}(\d+){word}", self._apply(stand_ins, "a conversation"))
            frame = Frame(around=tuple(around[::2]), shown=tuple(map(int, around[1::2])))
        if len(self.frames) < _MOST_FRAMES:
            self.frames[shape] = frame
        return frame

    def _fitted(
        self, text: str, around: Sequence[str], places: Sequence[int], parts: Sequence[tuple[str, str]], where: str
    ) -> list[tuple[int, int]]:
        """The spans of the answers, if the whole text is what is around them and they."""
        if not text.startswith(around[0]):
            raise _unmaskable(where, places[0])
        spans, end, start = [], 0, len(around[0])
        for number, (thoughts, answer), after in zip(places, parts, around[1:], strict=True):
            length = _length_of_body(text, start, answer, after, is_last=number == places[-1])
            if length is None:
                raise _unmaskable(where, number)
            begin = end + _begin(text[end:start], thoughts, self.habits.prompt)
            if "<think>" in thoughts.replace("<think>", "", 1) and thoughts.strip() not in text[end:start]:
                raise _unmaskable(where, number)  # templates take what follows the last "<think>" for the thoughts
            end = start + length
            if not text[begin:end].strip():
                raise DataError(
                    f"{where}, message {number + 1}: the chat template leaves nothing of this answer but its end. Give it more "
                    "than white space and thoughts, or nothing."
                )
            spans.append((begin, end + self._length_of_stop(after, where)))
            start = end + len(after)
        return spans

    def _length_of_stop(self, after: str, where: str) -> int:
        for stop in self.habits.stops:
            if after.startswith(stop):
                return len(stop)
        raise DataError(
            f"{where}: the chat template puts nothing after an answer that tells its end, so the model could not learn to stop."
            " Write {{ eos_token }} there, and see that the tokenizer has the template's special tokens; or give another."
        )


def _assembled(frame: Frame | None, messages: Sequence[Mapping[str, str]], places: Sequence[int]) -> list[str] | None:
    """`ChatTemplate._rendered`, without rendering: from what the template writes around all texts of any such conversation."""
    filled = [number for number, each in enumerate(messages) if each["content"]]
    if frame is None or list(frame.shown) != filled:
        return None
    around = [frame.around[0]]
    for number, literal in zip(filled, frame.around[1:], strict=True):
        if number in places:
            around.append(literal)
        else:
            around[-1] += messages[number]["content"] + literal
    return around


def _require_all_shown(text: str, frame: Frame | None, messages: Sequence[Mapping[str, str]], where: str) -> None:
    """Raise where a text that is no answer is left out: a tool's, or a system text's, for which a template has no words."""
    for number, each in enumerate(messages):
        content = each["content"].strip()
        if content and each["role"] != ASSISTANT and not (number in frame.shown if frame else content in text):
            raise DataError(
                f"{where}, message {number + 1}: the chat template leaves out the text of the {each['role']}. Give "
                "--chat_template one that has a place for it, or take it out of the data."
            )


def _length_of_body(text: str, start: int, answer: str, after: str, *, is_last: bool) -> int | None:
    """How long an answer is that stands in `text` at `start`, followed by `after`; white space at its ends may be gone."""
    for body in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
        end = start + len(body)
        if text.startswith(body, start) and text.startswith(after, end) and (not is_last or end + len(after) == len(text)):
            return len(body)
    return None


def _begin(before: str, thoughts: str, prompt: str) -> int:
    """Where the model begins to write, in what stands between the last answer and this one, thoughts included.

    White space that follows the prompt is its own: most tokenizers join it with the first word.
    """
    start = len(before)
    if thoughts:
        kept = [each.start() for each in re.finditer("<think>", before) if _same_thoughts(before[each.start() :], thoughts)]
        start = kept[-1] if kept else start
    if not prompt:
        return len(before[:start].rstrip())
    place = before.rfind(prompt, 0, start + len(prompt))  # not in the thoughts
    first = place + len(prompt)
    return first if place >= 0 and (first > start or not before[first:start].strip()) else start


def _split_thoughts(content: str) -> tuple[str, str]:
    """An answer's thoughts, with the tags and the white space around them, and the rest."""
    found = _THOUGHTS.match(content)
    return (content[: found.end()], content[found.end() :]) if found else ("", content)


def _same_thoughts(text: str, thoughts: str) -> bool:
    """True if a text is these thoughts, but for white space."""
    one, other = _THOUGHTS.fullmatch(text), _THOUGHTS.fullmatch(thoughts)
    return one is not None and other is not None and one[1].strip() == other[1].strip()


def _unused(messages: Sequence[Mapping[str, str]]) -> str:
    """A word that is in no message, and that no template looks for, strips or escapes."""
    word = STAND_IN
    while any(word in message["content"] for message in messages):
        word += "r"
    return word


def _unmaskable(where: str, index: int) -> DataError:
    return DataError(
        f"{where}, message {index + 1}: the chat template rewrites the turns of this conversation, so it can't be told surely "
        f"which part of its text is the assistant's answer. {VICUNA_INSTEAD}"
    )
