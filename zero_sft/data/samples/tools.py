"""Parse the tools that a sample offers to the assistant, and the calls in its turns. Pure.

Other tools write them in several shapes, which are brought into OpenAI's:

    tools           a list, or its JSON as text, of {"type": "function", "function": {"name": ..., "parameters": ...}}, or of
                    the inner objects; also under the older key `functions`
    tool_calls      a list of {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}, or of the inner
                    objects; `arguments` is an object, or its JSON as text
    function_call   one inner object
    a turn of the role `function_call` or `tool_call`, whose text is the JSON of one inner object, or of a list of them

Arrow gives all structs of a column the same keys, so Parquet and datasets of the hub fill objects with nulls. Keys whose value
is null are therefore removed from objects, whatever file they come from. In JSON that is written as text they stay.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zero_sft.data.samples.conversation import ASSISTANT, TOOL, ToolCall, Turn
from zero_sft.data.samples.key_meanings import is_empty, word_set
from zero_sft.errors import DataError
from zero_sft.json_text import JsonError, parse_json
from zero_sft.printable import excerpt, first_of

TOOL_KEYS = ("tools", "functions")
"""The keys of a sample under which tools stand."""

CALL_KEYS = ("tool_calls", "function_call")
"""The keys of a turn under which calls stand."""

_CALL_EXAMPLE = '{"name": ..., "arguments": {...}}'
_DEEPEST = 100
_NOTES_OF_CALLS = word_set("id call_id type index")
_UNKNOWN_TOOL = "calls of a tool that is not among the sample's tools"


def parse_tools(sample: Mapping[str, Any], where: str) -> str:
    """Return a sample's tools as the JSON text of a list in OpenAI's shape; an empty text if there are none.

    Raises:
        DataError: tools under two keys, something else than a list, or a tool without a name.
    """
    given = {key: sample[key] for key in TOOL_KEYS if key in sample and not is_empty(sample[key])}
    if len(given) > 1:
        raise DataError(f"{where}: tools under both `tools` and `functions`. Keep one of them.", code="data.tools_twice")
    for key, value in given.items():
        tools = _from_text(value, where, key)
        if not isinstance(tools, list):
            raise DataError(
                f"{where}: `{key}` must be a list of tools, or its JSON as text; got {excerpt(value)}.", code="data.bad_tools"
            )
        parsed = [
            _parse_tool(_plain(tool, where, key), f"{where}, tool {number}") for number, tool in enumerate(tools, start=1)
        ]
        return _to_text(parsed, where, key) if parsed else ""
    return ""


def tool_names(tools: str) -> list[str]:
    """Return the names of the tools in the JSON text of `parse_tools`."""
    return [tool["function"]["name"] for tool in json.loads(tools or "[]")]


def parse_calls(turn: Mapping[str, Any], place: str) -> tuple[ToolCall, ...]:
    """Return the calls under the keys of a turn.

    Raises:
        DataError: calls under two keys, or something that is not a call.
    """
    # a call without a name and arguments is a mistake, unlike an object that Arrow has filled with nulls
    nothing = (None, "", [], {})
    given = {key: turn[key] for key in CALL_KEYS if turn.get(key) not in nothing}
    given = {key: value for key, value in given.items() if isinstance(value, list | str) or not is_empty(value)}
    if len(given) > 1:
        raise DataError(
            f"{place}: calls under both `tool_calls` and `function_call`. Keep one of them.", code="data.calls_twice"
        )
    for key, value in given.items():
        return calls_of(_from_text(value, place, key), f"{place}, `{key}`")
    return ()


def parse_call_text(text: str, place: str) -> tuple[ToolCall, ...]:
    """Return the calls in the text of a turn whose role says that it is a call; raises `DataError`."""
    return calls_of(_from_text(text, place, "the call"), place)


def calls_of(value: Any, place: str) -> tuple[ToolCall, ...]:
    """Parse one call or a list of calls; raises `DataError`."""
    calls = value if isinstance(value, list) else [value]
    return tuple(_parse_call(call, f"{place}, call {number}") for number, call in enumerate(calls, start=1))


def require_answered(turns: Sequence[Turn], where: str) -> None:
    """Raise `DataError` for a tool's turn that answers none of the calls before it.

    Without ids, the number of tool turns counts. Turns after an answer without calls pass: some data has its calls in the text.
    """
    calls: tuple[ToolCall, ...] = ()
    answered = 0
    for number, turn in enumerate(turns, start=1):
        if turn.role == ASSISTANT:
            calls, answered = turn.calls, 0
        elif turn.role == TOOL and calls:
            answered += 1
            ids = [call.call_id for call in calls]
            is_unknown = bool(turn.call_id) and all(ids) and turn.call_id not in ids
            if is_unknown or answered > len(calls):
                what = f"the call {excerpt(turn.call_id)}" if is_unknown else "a call"
                raise DataError(
                    f"{where}, turn {number}: this turn of a tool answers {what}, but the answer before it has "
                    f"{'the calls ' + first_of(map(excerpt, ids)) if is_unknown else f'only {len(calls)}'}. Repair the ids, or "
                    "remove the turn.",
                    code="data.tool_turn_without_call",
                )


def with_tool_names(turns: Sequence[Turn]) -> list[Turn]:
    """Give each tool's turn that has no name the name of the call that it answers: by its id, or by its position."""
    from dataclasses import replace

    named, calls, position = list[Turn](), tuple[ToolCall, ...](), 0
    for turn in turns:
        if turn.role == ASSISTANT:
            calls, position = turn.calls, 0
        elif turn.role == TOOL and calls and not turn.name:
            by_id = [call for call in calls if turn.call_id and call.call_id == turn.call_id]
            call = (by_id or calls[position : position + 1] or calls[-1:])[0]
            turn, position = replace(turn, name=call.name), position + 1
        named.append(turn)
    return named


def count_results_without_calls(turns: Sequence[Turn]) -> Counter[str]:
    """Count the results of tools that follow an answer without calls, by description: the call may be in its text."""
    count, answer = 0, None
    for turn in turns:
        answer = turn if turn.role == ASSISTANT else answer
        count += turn.role == TOOL and not (answer and answer.calls)
    return Counter({"results of tools after answers without `tool_calls`; their calls are to be in the text": count})


def count_unknown_calls(turns: Sequence[Turn], tools: str) -> Counter[str]:
    """Count the calls of tools that the sample does not offer, if it offers some."""
    names = set(tool_names(tools))
    return Counter({_UNKNOWN_TOOL: sum(call.name not in names for turn in turns for call in turn.calls) if names else 0})


def without_nulls(value: Any, depth: int = 0) -> Any:
    """Remove the keys whose value is null from an object, and from those in it; raises ValueError if it is nested deeply."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {key: without_nulls(each, depth + 1) for key, each in value.items() if each is not None}
    return [without_nulls(each, depth + 1) for each in value] if isinstance(value, list | tuple) else value


def _parse_tool(tool: Any, place: str) -> dict[str, Any]:
    """Bring one tool into OpenAI's shape; raises `DataError`."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f'{place}: expected {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}; got {excerpt(tool)}.',
            code="data.bad_tool",
        )
    return dict(tool) if inner is not tool else {"type": "function", "function": dict(tool)}


def _parse_call(call: Any, place: str) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if isinstance(call, Mapping) and isinstance(inner, str) and "name" not in call:
        inner = {"name": inner, "arguments": call.get("arguments")}  # {"function": "search", "arguments": ...}
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping) or not isinstance(name, str) or not name.strip():
        raise DataError(f"{place}: expected a call, {_CALL_EXAMPLE}; got {excerpt(call)}.", code="data.bad_call")
    unknown = [key for part, known in ((call, {"function"}), (inner, set[str]())) for key, value in part.items()
               if key not in {"name", "arguments"} | _NOTES_OF_CALLS | known and not is_empty(value)]  # fmt: skip
    if unknown:
        raise DataError(
            f"{place}: unknown key `{excerpt(unknown[0])}` in a call. Expected {_CALL_EXAMPLE}; remove the key.",
            code="data.unknown_key_of_call",
        )
    call_id = call.get("id") or call.get("call_id") or ""
    return ToolCall(name=name, arguments=_parse_arguments(inner.get("arguments"), place), call_id=str(call_id))


def _parse_arguments(value: Any, place: str) -> str:
    """Return the arguments of a call as the JSON text of an object; raises `DataError`."""
    if isinstance(value, str) and value.strip():
        arguments = _from_text(value, place, "arguments")
    else:
        arguments = _plain(value, place, "arguments") if value else {}
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{place}: `arguments` must be a JSON object, or its text; got {excerpt(value)}.", code="data.bad_arguments"
        )
    return _to_text(arguments, place, "arguments")


def _from_text(value: Any, place: str, key: str) -> Any:
    """Parse a value that is JSON as text; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except JsonError as error:
        raise DataError(
            f"{place}: the text of `{key}` is not JSON: {error.place_and_reason}; got {excerpt(value)}. Repair it, or write "
            "the object itself.",
            code="data.text_is_not_json",
        ) from error


def _plain(value: Any, place: str, key: str) -> Any:
    """Return a value without nulls; raises `DataError` if it is nested too deeply."""
    try:
        return without_nulls(value)
    except ValueError as error:
        raise DataError(f"{place}: `{key}` can't be used: {error}. Simplify it.", code="data.nested_too_deep") from error


def _to_text(value: Any, place: str, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # a date of a Parquet file, or half a character
        raise DataError(
            f"{place}: `{key}` can't be written as JSON: {error}. Write it as text.", code="data.not_as_json"
        ) from error
    return text
