"""Render FastChat's `vicuna_v1.1` template, character for character:

    {system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

As in FastChat's labels, a span begins where the model begins to write: right after "ASSISTANT:". So it includes the space,
which most tokenizers join with the first word. It ends with the token that ends the turn.
"""

import json
from dataclasses import dataclass
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, SYSTEM, TOOL, USER, Conversation
from zero_sft.data.templates.rendered import RenderedText, TrainedSpans
from zero_sft.errors import DataError

VICUNA = "vicuna"
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
    "{{% elif message['role'] != 'system' %}}{{{{ raise_exception('no turns of tools') }}}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'ASSISTANT:' }}}}{{% endif %}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VicunaTemplate:
    """FastChat's `vicuna_v1.1`; `turn_end` is the token that ends an answer, see `vicuna_turn_end`."""

    turn_end: str = VICUNA_STOP
    name = VICUNA
    trains_on_blanks = True  # an answer of white space counts as an answer, as in FastChat
    adds_special_tokens = True  # the text does not begin with a beginning-of-sequence token

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.turn_end,)

    def unused_variables(self, _conversation: Conversation) -> list[str]:
        """Return no names: a conversation with variables is refused."""
        return []

    def render(self, conversation: Conversation) -> RenderedText:
        """Render as FastChat does: for an empty text, the space before it and the separator after it are left out."""
        if conversation.tools or any(turn.role == TOOL or turn.calls for turn in conversation.turns):
            raise DataError(
                f"{conversation.where}: the Vicuna template has no turns, calls or lists of tools. Give --chat_template a "
                "template that has, such as hermes.",
                code="data.vicuna_without_tools",
            )
        if any(turn.thoughts for turn in conversation.turns):
            raise DataError(
                f"{conversation.where}: an answer has thoughts in a field, and the Vicuna template has no place for them. Give "
                "--reasoning inline, which writes them into the text, or --reasoning drop.",
                code="data.template_takes_no_thoughts",
            )
        if conversation.template_kwargs:
            raise DataError(
                f"{conversation.where}: the Vicuna template has no variables. Remove `chat_template_kwargs`.",
                code="data.vicuna_without_variables",
            )
        system = next((turn.text for turn in conversation.turns if turn.role == SYSTEM), VICUNA_SYSTEM)
        pieces, answers, ends = [f"{system} "], [], []
        length = len(pieces[0])
        for number, turn in enumerate(conversation.turns):
            if turn.role == USER:
                pieces.append(f"USER: {turn.text} " if turn.text else "USER:")
            elif turn.role == ASSISTANT:
                pieces.append("ASSISTANT:" + (f" {turn.text}{self.turn_end}" if turn.text else ""))
            else:
                continue
            start, length = length + len("ASSISTANT:"), length + len(pieces[-1])
            if turn.role == ASSISTANT and turn.text:
                ends.append((number, length))
                answers.append((turn, (start, length)))
        text, trained = "".join(pieces), TrainedSpans()
        for turn, (start, stop) in answers:
            body = (start + 1, start + 1 + len(turn.text))
            trained = trained.with_answer(turn, [(start, stop)], body, text, conversation.weight)
        return RenderedText(
            text=text,
            **trained.fields(),
            adds_special_tokens=self.adds_special_tokens,
            ends=tuple(ends),
        )

    def prompt(self, question: str) -> str:
        """Render one question and the generation prompt, after which the model writes its answer."""
        return f"{VICUNA_SYSTEM} USER: {question} ASSISTANT:"

    def jinja(self, tokenizer: Any) -> str:
        """Return the same template in Jinja, to save with `tokenizer`; it gives the same tokens as training."""
        first = tokenizer("a").input_ids[:1]
        bos = str(tokenizer.bos_token) if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
        words = {"BOS": bos, "SYSTEM": VICUNA_SYSTEM, "STOP": self.turn_end}
        return _VICUNA_JINJA.format(**{name: json.dumps(word, ensure_ascii=False) for name, word in words.items()})


def vicuna_turn_end(tokenizer: Any) -> str:
    """Return "</s>" if it is a special token of the tokenizer, otherwise its end-of-sequence token.

    In some vocabularies, such as Gemma's, "</s>" is an ordinary token (HTML's tag), or several tokens. Neither would stop
    generation. Raises `DataError` if the tokenizer has neither token.
    """
    added = tokenizer.get_added_vocab().get(VICUNA_STOP)
    if added is not None and (tokenizer.eos_token == VICUNA_STOP or tokenizer.added_tokens_decoder[added].special):
        return VICUNA_STOP
    if tokenizer.eos_token:
        return str(tokenizer.eos_token)
    raise DataError(
        "--chat_template vicuna: this model's tokenizer has no end-of-sequence token, so the model could not learn to stop. "
        "Set eos_token in its tokenizer_config.json.",
        code="data.tokenizer_without_eos",
    )
