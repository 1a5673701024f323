"""Make a conversation of its turns, and of what stands next to them: a system text, tools, variables for the template. Pure."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zero_sft.data.samples.columns import Columns
from zero_sft.data.samples.conversation import SYSTEM, Conversation, Sample, Turn, dialogue
from zero_sft.data.samples.key_meanings import is_empty
from zero_sft.data.samples.marks import weight_of_sample
from zero_sft.data.samples.tools import (
    TOOL_KEYS,
    count_results_without_calls,
    count_unknown_calls,
    parse_tools,
    require_answered,
    tool_names,
    with_tool_names,
    without_nulls,
)
from zero_sft.data.samples.turn import require_unicode
from zero_sft.data.samples.turns import ParsedTurns, Reasoning
from zero_sft.errors import DataError
from zero_sft.json_text import JsonError, parse_json
from zero_sft.printable import excerpt

_TEMPLATE_KWARGS = "chat_template_kwargs"
CONVERSATION_KEYS = (*TOOL_KEYS, _TEMPLATE_KWARGS)
"""The optional keys of a conversation, next to its turns."""

_RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "conversation",
    "chat_template",
    "tokenize",
    "continue_final_message",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """The user's options for reading samples: `--data_format`, `--columns`, `--tools`, `--reasoning`, `--merge_turns`."""

    data_format: str | None = None
    columns: Columns = ()
    tools: Literal["render", "ignore"] = "render"
    reasoning: Reasoning = "field"
    merge_turns: bool = False


DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSample:
    """A sample, the number of its dropped turns by reason (see `dialogue`), and its keys that were not read.

    `changes` counts what the options have changed, and what looks wrong, by description.
    """

    sample: Sample
    dropped_turns: Counter[str] = field(default_factory=Counter)
    unread_keys: tuple[str, ...] = ()
    changes: Counter[str] = field(default_factory=Counter)


def make_conversation(
    sample: Mapping[str, Any],
    parsed: ParsedTurns,
    where: str,
    options: ReadOptions,
    words: Mapping[str, str] | None = None,
) -> ParsedSample:
    """Make a conversation of turns, and of what stands next to them: a system text, tools, variables for the template."""
    turns, numbers = parsed.turns, parsed.numbers
    system = text_or_empty(sample, "system", where)
    if system and turns and turns[0].role == SYSTEM:
        raise DataError(
            f"{where}: two system texts, one as the first turn and one as `system`. Remove one.",
            code="data.second_system_text",
        )
    if system:
        turns, numbers = [Turn(role=SYSTEM, text=system), *turns], [0, *numbers]
    kept, dropped = dialogue(turns, numbers, where, words or {})
    tools, changes = parse_tools(sample, where), parsed.changes
    if tools and options.tools == "ignore":
        tools, changes = "", changes + Counter({"samples whose `tools` are not given to the template (--tools ignore)": 1})
    _require_new_tools(tools, kept, where)
    require_answered(kept, where)
    return ParsedSample(
        sample=Conversation(
            turns=tuple(with_tool_names(kept)),
            where=where,
            tools=tools,
            template_kwargs=_template_kwargs(sample, where),
            weight=weight_of_sample(sample, where),
        ),
        dropped_turns=dropped,
        unread_keys=parsed.unread_keys,
        changes=changes + count_unknown_calls(kept, tools) + count_results_without_calls(kept),
    )


def _require_new_tools(tools: str, turns: Sequence[Turn], where: str) -> None:
    """Raise `DataError` if the system text lists the tools already, as in Hermes' data: the template would list them twice."""
    text = turns[0].text if tools and turns and turns[0].role == SYSTEM else ""
    if text and all(f'"{name}"' in text for name in tool_names(tools)):
        raise DataError(
            f"{where}: the system text already has the tools of `tools`, so the chat template would show them twice. Give "
            "--tools ignore to keep those of the text, or remove them from the text.",
            code="data.tools_in_system_text",
        )


def _template_kwargs(sample: Mapping[str, Any], where: str) -> str:
    """Return the variables for the chat template as JSON text; raises `DataError` for something else than an object."""
    value = sample.get(_TEMPLATE_KWARGS)
    if is_empty(value):
        return ""
    if isinstance(value, str):
        with contextlib.suppress(JsonError):
            value = parse_json(value)
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: `{_TEMPLATE_KWARGS}` must be an object, or its JSON as text; got {excerpt(value)}.",
            code="data.bad_template_kwargs",
        )
    reserved = next((key for key in value if key in _RESERVED), None)
    if reserved:
        raise DataError(
            f"{where}: `{_TEMPLATE_KWARGS}` has the key `{reserved}`, which the rendering itself sets. Remove it.",
            code="data.bad_template_kwargs",
        )
    return json.dumps(without_nulls(value), ensure_ascii=False, sort_keys=True)


def text_or_empty(sample: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text of a key, "" if it is null or absent; raises `DataError` for something else."""
    return "" if sample.get(key) is None else text_of(sample[key], key, where)


def text_of(value: Any, key: str, where: str) -> str:
    """Return a value that must be a text; raises `DataError`."""
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be a text; got {excerpt(value)}.", code="data.not_a_text")
    require_unicode(value, where)
    return value
