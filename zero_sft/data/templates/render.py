"""Render a chat with a chat template, for a limited time."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from zero_sft.data.templates.chat import Chat
from zero_sft.data.templates.rendered import Span
from zero_sft.data.templates.time_limit import TimeOver, time_limit
from zero_sft.errors import DataError
from zero_sft.printable import printable

Result = TypeVar("Result")

_MARK = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")

RENDER_SECONDS = 10.0
"""The longest time for one conversation. Real templates take a millisecond for a thousand turns."""

VICUNA_INSTEAD = "Use another template: --chat_template vicuna takes any conversation without tools."
HERMES_INSTEAD = "Use another template: --chat_template hermes takes calls of tools."


def render_chat(tokenizer: Any, source: str | None, chat: Chat, where: str, *, generation_prompt: bool = False) -> str:
    """Render a chat with `source`, or the tokenizer's template if it is None; raise `DataError` if the template fails."""

    def render() -> str:
        return str(
            tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) if chat.tools else None,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **chat.variables,
            )
        )

    return _guarded(render, chat, where)


def has_marks(source: str) -> bool:
    """Whether a template marks what the assistant writes, with `{% generation %}`."""
    return _MARK.search(source) is not None


def marked_spans(tokenizer: Any, source: str, chat: Chat, where: str) -> list[Span]:
    """Return the ranges of characters that a template marks as the assistant's; raise `DataError` if the template fails.

    With the function that transformers' `apply_chat_template` calls, which returns such ranges only as tokens.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def render() -> list[Span]:
        _, ranges = render_jinja_template(
            conversations=[[{key: value for key, value in each.items() if value is not None} for each in chat.messages]],
            tools=[dict(tool) for tool in chat.tools] if chat.tools else None,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **chat.variables},
        )
        return [(int(start), int(stop)) for start, stop in ranges[0]]

    return _guarded(render, chat, where)


def _guarded(render: Callable[[], Result], chat: Chat, where: str) -> Result:
    """Call a function that renders a chat, for a limited time; raise `DataError` for whatever goes wrong."""
    from jinja2.exceptions import TemplateSyntaxError

    instead = HERMES_INSTEAD if chat.has_tools else VICUNA_INSTEAD
    try:
        with time_limit(RENDER_SECONDS):
            return render()
    except TimeOver as error:
        raise DataError(
            f"{where}: the chat template takes more than {RENDER_SECONDS:g} s for this conversation, so it probably loops. "
            f"{instead}",
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
            f"{where}: the chat template can't render this conversation: {reason}. {instead}", code="data.template_fails"
        ) from error
