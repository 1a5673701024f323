"""From a conversation to one text, and which characters of it are the assistant's.

Two templates. Vicuna's is FastChat's `vicuna_v1.1`, character for character:

    {system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

The other is the tokenizer's own chat template. Such templates may do anything, so nothing is assumed about them: each
answer's place is found by rendering the conversation up to it, once with the prompt for an answer and once with a
stand-in for it, and the whole text must agree with both; where it doesn't, the template is refused. No `{% generation %}`
markers are needed.

A span begins where the model begins to write: right after "ASSISTANT:", so that it holds the space which most tokenizers
join with the first word; FastChat's labels do the same. It ends with the token that ends the turn.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.data.conversation import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Passage, Sample
from zero_sft.errors import DataError

VICUNA, MODEL = "vicuna", "model"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_STOP = "</s>"

_VICUNA_JINJA = (
    "{{% set own = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}}"
    "{{{{ {BOS} + (own[0] if own else {SYSTEM}) + ' ' }}}}"
    "{{% for message in messages %}}{{% if message['role'] == 'user' %}}"
    "{{{{ 'USER: ' + message['content'] + ' ' if message['content'] else 'USER:' }}}}"
    "{{% elif message['role'] == 'assistant' %}}"
    "{{{{ 'ASSISTANT:' + (' ' + message['content'] + {STOP} if message['content'] else '') }}}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'ASSISTANT:' }}}}{{% endif %}}"
)

_STAND_IN = "zerosftanswer"  # no template looks for it, strips it or escapes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A sample as text; `spans` are the half-open ranges of characters to train on, in order.

    `adds_special_tokens`: whether the tokenizer is to add its own, since the text has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str
    adds_special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VicunaTemplate:
    """FastChat's `vicuna_v1.1`; `stop` ends an answer, "</s>" wherever the tokenizer has it."""

    stop: str = VICUNA_STOP
    name = VICUNA
    adds_special_tokens = True  # the text has no beginning-of-sequence token of its own

    def render(self, conversation: Conversation) -> Rendered:
        """As FastChat does: an empty text leaves out the space before it and what separates it from the next turn.

        Raises:
            DataError: a tool's turn, for which the template has no words.
        """
        if any(turn.role == TOOL for turn in conversation.turns):
            raise DataError(f"{conversation.where}: the Vicuna template has no turns of tools. Use --chat_template model.")
        system = next((turn.text for turn in conversation.turns if turn.role == SYSTEM), VICUNA_SYSTEM)
        text, spans = f"{system} ", []
        for turn in conversation.turns:
            if turn.role == USER:
                text += f"USER: {turn.text} " if turn.text else "USER:"
            elif turn.role == ASSISTANT:
                text += "ASSISTANT:"
                start = len(text)
                if turn.text:
                    text += f" {turn.text}{self.stop}"
                    if turn.trained:
                        spans.append((start, len(text)))
        return Rendered(text=text, spans=tuple(spans), where=conversation.where, adds_special_tokens=self.adds_special_tokens)

    def prompt(self, question: str) -> str:
        """The text after which the model writes its answer to one question."""
        return f"{VICUNA_SYSTEM} USER: {question} ASSISTANT:"

    def jinja(self, tokenizer: Any) -> str:
        """This template as a chat template for `tokenizer`: it renders what is trained on, token for token."""
        first = tokenizer("a").input_ids[:1]
        bos = str(tokenizer.bos_token) if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
        words = {"BOS": bos, "SYSTEM": VICUNA_SYSTEM, "STOP": self.stop}
        return _VICUNA_JINJA.format(**{name: json.dumps(word, ensure_ascii=False) for name, word in words.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTemplate:
    """The tokenizer's own chat template; `marks` are its tokens that may end a turn."""

    tokenizer: Any  # PreTrainedTokenizerBase, whose stub hides methods behind a catch-all attribute
    marks: tuple[str, ...]
    name = MODEL
    adds_special_tokens = False  # chat templates write theirs themselves

    def render(self, conversation: Conversation) -> Rendered:
        """Render with the template, and find the answers.

        Raises:
            DataError: the template fails on this conversation, rewrites its turns, or ends an answer with nothing.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
        if not messages:
            return Rendered(text="", spans=(), where=conversation.where, adds_special_tokens=self.adds_special_tokens)
        text = self._apply(messages, conversation.where)
        spans = [
            self._span(text, messages, index, conversation.where)
            for index, turn in enumerate(conversation.turns)
            if turn.role == ASSISTANT and turn.text and turn.trained
        ]
        return Rendered(text=text, spans=tuple(spans), where=conversation.where, adds_special_tokens=self.adds_special_tokens)

    def prompt(self, question: str) -> str:
        """The text after which the model writes its answer to one question.

        Raises:
            DataError: the template fails on it.
        """
        return self._apply([{"role": USER, "content": question}], "a prompt", prompt=True)

    def _span(self, text: str, messages: Sequence[Mapping[str, str]], index: int, where: str) -> tuple[int, int]:
        """Where message `index` is in `text`, from the end of its prompt to the end of its turn.

        Worked example (ChatML): prompt "...<|im_start|>assistant\\n", opening "", answer "Hello.", ending "<|im_end|>\\n":
        the span is "Hello.<|im_end|>".
        """
        prompt = self._apply(messages[:index], where, prompt=True)
        probe = self._apply([*messages[:index], {"role": ASSISTANT, "content": _STAND_IN}], where)
        if not text.startswith(prompt) or not probe.startswith(prompt) or probe.count(_STAND_IN) != 1:
            raise self._unmaskable(where, index)
        opening, _, ending = probe[len(prompt) :].partition(_STAND_IN)
        answer = messages[index]["content"]
        for before in (opening, ""):  # some templates open the last answer in another way than earlier ones
            for body in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
                if text.startswith(f"{before}{body}{ending}", len(prompt)):
                    start = len(prompt) + (len(before) if before.strip() else 0)
                    return start, len(prompt) + len(before) + len(body) + self._length_of_stop(ending, where)
        raise self._unmaskable(where, index)

    def _length_of_stop(self, ending: str, where: str) -> int:
        length = length_of_stop(ending, self.marks)
        if not length:
            raise DataError(
                f"{where}: the model's chat template puts nothing after an answer, so the model could not learn to stop. "
                "Use --chat_template vicuna."
            )
        return length

    def _apply(self, messages: Sequence[Mapping[str, str]], where: str, prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: the model's chat template can't render this conversation: {error}. Use --chat_template vicuna."
            ) from error
        return str(rendered)

    @staticmethod
    def _unmaskable(where: str, index: int) -> DataError:
        return DataError(
            f"{where}, message {index + 1}: the model's chat template rewrites the turns of this conversation, so it can't be "
            "told surely which part of its text is the assistant's answer. Use --chat_template vicuna."
        )


def render(sample: Sample, template: VicunaTemplate | ModelTemplate, tokenizer: Any) -> Rendered:
    """A conversation by the template; a passage as it is, with the token that ends it where it does not end so already.

    Raises:
        DataError: the template can't render the conversation, or its answers can't be told surely.
    """
    if isinstance(sample, Conversation):
        return template.render(sample)
    return _passage(sample, tokenizer)


def _passage(sample: Passage, tokenizer: Any) -> Rendered:
    text, end, begin = sample.prompt + sample.completion, tokenizer.eos_token, tokenizer.bos_token
    if end and not text.endswith(end):
        text += end
    spans = ((len(sample.prompt), len(text)),) if sample.completion else ()
    has_begin = bool(begin) and text.startswith(begin)
    return Rendered(text=text, spans=spans, where=sample.where, adds_special_tokens=not has_begin)


@functools.lru_cache(maxsize=1024)
def length_of_stop(ending: str, marks: tuple[str, ...]) -> int:
    """How much of what follows an answer the model must write itself: its end-of-turn token, and what is before it.

    Worked example: "<|im_end|>\\n" → 10. Where a template ends turns with plain text, all of it but trailing space.
    """
    found = [(ending.index(mark), -len(mark)) for mark in marks if mark in ending]
    if not found:
        return len(ending.rstrip())
    position, negative_length = min(found)
    return position - negative_length


def choose_template(name: str | None, tokenizer: Any) -> VicunaTemplate | ModelTemplate:
    """The template called `name`; for None the tokenizer's own if it has one, else Vicuna's.

    Raises:
        DataError: the tokenizer has no template, or no token to end an answer with.
    """
    own: Any = getattr(tokenizer, "chat_template", None)
    if name == VICUNA or (name is None and not own):
        return VicunaTemplate(stop=_vicuna_stop(tokenizer))
    if name not in (None, MODEL):
        raise DataError(f"unknown chat template {name!r}; expected {VICUNA} or {MODEL}.")
    if not own:
        raise DataError("--chat_template model: this model's tokenizer has no chat template. Use --chat_template vicuna.")
    marks = tuple(sorted(mark for mark in tokenizer.get_added_vocab() if mark.strip()))
    return ModelTemplate(tokenizer=tokenizer, marks=marks)


def _vicuna_stop(tokenizer: Any) -> str:
    """ "</s>" where that is one token, else the model's own end token: three tokens that spell it would not stop anything."""
    if VICUNA_STOP in tokenizer.get_added_vocab():
        return VICUNA_STOP
    if tokenizer.eos_token:
        return str(tokenizer.eos_token)
    raise DataError(
        "--chat_template vicuna: this model's tokenizer has no end-of-sequence token, so the model could not learn to stop. "
        "Set eos_token in its tokenizer_config.json."
    )
