"""The shapes of samples, tried with the templates of well-known models: `python -m tests.data.shapes` writes a table of them.

Each cell is computed: the trained tokens, decoded, are what was to be trained on, or the sample is refused with its reason. The
table is in docs/data.md.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.test_chat_templates import model_of
from tests.data.test_published_tokenizers import model_of as published_model
from tests.data.tiny import byte_tokenizer, make_pipeline, trained_text
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.columns import parse_columns
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.samples.sample_formats import FORMAT_KEYS
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import WEIGHTS, TokenizedSample
from zero_sft.errors import DataError

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- shapes: written by python -m tests.data.shapes -->\n", "<!-- end of shapes -->\n"

TRAINED, WITHOUT_THOUGHTS = "trained", "trained, without thoughts"

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]  # fmt: skip
ARGUMENTS = {"city": "Zürich"}
JSON_ARGUMENTS = json.dumps(ARGUMENTS, ensure_ascii=False)
ANSWER, LAST = "It is sunny.", "Bye."
TEXT_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {JSON_ARGUMENTS}}}\n</tool_call>'
THOUGHTS = "<think>\nhm\n</think>\n\n"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A template with its tokens: `load` it; what ends an answer in the middle and the last one, and how it writes a call."""

    load: Callable[[], tuple[Any, Any]]
    ends: tuple[str, str]
    call: str | None = None
    thoughts: str | None = THOUGHTS
    """What it writes for thoughts in the last answer; None: it leaves them out."""


def hermes() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer, choose_template("hermes", tokenizer)


MODELS = {
    "Llama-3.1": Model(
        load=lambda: model_of("llama3_1"), ends=("<|eot_id|>",) * 2,
        call=f'{{"name": "weather", "parameters": {JSON_ARGUMENTS}}}<|eot_id|>'
    ),
    "Qwen2.5": Model(load=lambda: model_of("qwen2_5"), ends=("<|im_end|>",) * 2, call=f"{TEXT_CALL}<|im_end|>"),
    "Qwen3": Model(load=lambda: model_of("qwen3"), ends=("<|im_end|>",) * 2, call=f"{TEXT_CALL}<|im_end|>"),
    "DeepSeek-R1": Model(load=lambda: model_of("deepseek_r1_distill"), ends=("<｜end▁of▁sentence｜>",) * 2, thoughts=None),
    "gpt-oss": Model(
        load=lambda: model_of("gptoss"), ends=("<|end|>", "<|return|>"),
        call=f" to=functions.weather<|channel|>commentary json<|message|>{JSON_ARGUMENTS}<|call|>",
        thoughts="<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "Mistral-Nemo": Model(
        load=lambda: published_model("Mistral-Nemo"), ends=("</s>",) * 2,
        call=f'[TOOL_CALLS][{{"name": "weather", "arguments": {JSON_ARGUMENTS}, "id": "abcdef123"}}]</s>',
    ),
    "Gemma 3": Model(load=lambda: model_of("gemma3"), ends=("<end_of_turn>",) * 2),
    "Hermes": Model(load=hermes, ends=("<|im_end|>",) * 2, call=f"{TEXT_CALL}<|im_end|>"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A sample, the options with which it is read, and what is to be trained on, given the model; weights if not all are 1."""

    sample: dict[str, Any]
    expected: Callable[[Model], list[str]]
    options: dict[str, Any] = field(default_factory=dict)
    weights: set[float] | None = None


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


REST = [user("Thanks"), assistant(LAST)]


def called(**call: Any) -> list[dict[str, Any]]:
    """A question, a call, what it returns, an answer, and another question and answer."""
    calls = [{"id": "abcdef123", "type": "function", "function": {"name": "weather", **call}}]
    tool = {"role": "tool", "tool_call_id": "abcdef123", "content": "sunny"}
    return [user("Weather?"), assistant(None, tool_calls=calls), tool, assistant(ANSWER), *REST]


def after_call(model: Model) -> list[str]:
    return [model.call or "no call", f"{ANSWER}{model.ends[0]}", f"{LAST}{model.ends[1]}"]


def plain(model: Model) -> list[str]:
    return [f"{ANSWER}{model.ends[0]}", f"{LAST}{model.ends[1]}"]


def thoughtful(model: Model) -> list[str]:
    return [f"{model.thoughts or ''}{LAST}{model.ends[1]}"]


PLAIN = [user("Weather?"), assistant(ANSWER), *REST]
CALL_TURN = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
_ID = re.compile('"id": "[0-9A-Za-z]{9}"')
"""The id of a call in Mistral's template, which is made up if the data has none."""
IDS = [70, 71, 72]


def sharegpt(*turns: tuple[str, str], tools: Any = None) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **({"tools": tools} if tools else {})}


OF_REST = (("human", "Thanks"), ("gpt", LAST))
THOUGHTFUL = {"messages": [user("Hi"), assistant(LAST, reasoning_content="hm")]}
SHAPES = {
    "OpenAI, arguments as objects": Shape(
        sample={"tools": TOOLS, "messages": called(arguments=ARGUMENTS)}, expected=after_call
    ),
    "OpenAI, arguments as text": Shape(
        sample={"tools": json.dumps(TOOLS), "messages": called(arguments=json.dumps(ARGUMENTS))}, expected=after_call
    ),
    "ShareGPT with tools (LLaMA-Factory)": Shape(
        sample=sharegpt(
            ("human", "Weather?"), ("function_call", CALL_TURN), ("observation", "sunny"), ("gpt", ANSWER), *OF_REST,
            tools=json.dumps([TOOLS[0]["function"]]),
        ),
        expected=after_call,
    ),
    "ms-swift": Shape(
        sample={"tools": json.dumps(TOOLS), "messages": [
            user("Weather?"), {"role": "tool_call", "content": CALL_TURN}, {"role": "tool_response", "content": "sunny"},
            assistant(ANSWER), *REST,
        ]},
        expected=after_call,
    ),
    "Hermes: calls in the text, `--tools ignore`": Shape(
        sample=sharegpt(
            ("system", f"<tools>{json.dumps(TOOLS)}</tools>"), ("human", "Weather?"), ("gpt", TEXT_CALL), ("tool", "sunny"),
            ("gpt", ANSWER), *OF_REST, tools=json.dumps(TOOLS),
        ),
        options={"tools": "ignore"},
        expected=lambda model: [f"{TEXT_CALL}{model.ends[0]}", *plain(model)],
    ),
    "thoughts in a field": Shape(sample=THOUGHTFUL, expected=thoughtful),
    "thoughts in a field, `--reasoning inline`": Shape(
        sample=THOUGHTFUL, options={"reasoning": "inline"}, expected=thoughtful
    ),
    "thoughts in the text": Shape(sample={"messages": [user("Hi"), assistant(f"{THOUGHTS}{LAST}")]}, expected=thoughtful),
    "parts of text": Shape(
        sample={"messages": [
            {**turn, "content": [{"type": "text", "text": turn["content"][:2]}, {"type": "text", "text": turn["content"][2:]}]}
            for turn in PLAIN
        ]},
        expected=plain,
    ),
    "role `developer`": Shape(sample={"messages": [{"role": "developer", "content": "Be brief."}, *PLAIN]}, expected=plain),
    "`train_detail`": Shape(
        sample={"messages": [*PLAIN[:3], assistant(LAST, train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}])]},
        expected=lambda model: [plain(model)[0], LAST[:2], model.ends[1]],
    ),
    "weights of turns and samples": Shape(
        sample={"weight": 0.5, "messages": [
            user("Weather?"), assistant(ANSWER, weight=0), user("Thanks"), assistant(LAST, weight=0.5)
        ]},
        expected=lambda model: plain(model)[1:],
        weights={0.25},
    ),
    "`chat_template_kwargs`": Shape(
        sample={"chat_template_kwargs": {"enable_thinking": False}, "messages": PLAIN}, expected=plain
    ),
    "other columns, `--columns`": Shape(
        sample={"talk": {"turns": [{"who": turn["role"], "said": turn["content"]} for turn in PLAIN]}},
        options={"columns": parse_columns("messages=talk.turns,role=who,content=said", FORMAT_KEYS)},
        expected=plain,
    ),
    "tokenised": Shape(sample={"input_ids": IDS, "completion_mask": [0, 1, 1]}, expected=lambda _: []),
}  # fmt: skip


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    return MODELS[name].load()


def outcome(model_name: str, shape_name: str) -> str:
    """Try a shape with a template; return "trained", or the code of the error. Fail if something else is trained on."""
    model, shape, (tokenizer, template) = MODELS[model_name], SHAPES[shape_name], loaded(model_name)
    parser = SampleParser(options=ReadOptions(**shape.options))
    pipeline = make_pipeline(tokenizer, model_max_length=10_000, parser=parser)
    pipeline = type(pipeline)(**{name: getattr(pipeline, name) for name in pipeline.__slots__} | {"template": template})
    try:
        batch = pipeline.make_rows([(shape.sample, "sample 1")])
    except DataError as error:
        return str(error.code)
    (row,) = batch.rows.to_pylist()
    example = TokenizedSample(input_ids=row["input_ids"], labels=row["labels"], trained_tokens=0)
    if shape_name == "tokenised":
        assert (row["input_ids"], row["labels"]) == (IDS, [-100, *IDS[1:]])
    else:
        texts = [_ID.sub('"id": "abcdef123"', text) for text in trained_text(example, tokenizer)]
        assert texts == shape.expected(model), (model_name, shape_name)
    weights = {each for each, label in zip(row[WEIGHTS] or [], row["labels"], strict=False) if label != -100} or None
    assert weights == shape.weights
    return WITHOUT_THOUGHTS if batch.report.dropped_thoughts else TRAINED


REASONS = {
    "data.template_without_calls": "refused: renders no calls",
    "data.template_takes_no_thoughts": "refused: has no place for them",
    "data.template_drops_text": "refused: leaves out the system text",
    "data.template_drops_tools": "refused: leaves out the tools",
    "data.template_fails": "refused: takes no turns of tools",
}
"""The reasons why a template is refused, for the table; another code fails."""


def table() -> str:
    """Return the table of all shapes and models as Markdown."""
    lines = [f"| shape | {' | '.join(MODELS)} |", f"| --- |{' --- |' * len(MODELS)}"]
    for shape in SHAPES:
        cells = [outcome(model, shape) for model in MODELS]
        lines.append(f"| {shape} | {' | '.join(cell if cell.startswith(TRAINED) else REASONS[cell] for cell in cells)} |")
    return "\n".join(lines) + "\n"


def in_document(text: str) -> str:
    """Return the table in the document's text."""
    return text.partition(BEGIN)[2].partition(END)[0].strip() + "\n"


if __name__ == "__main__":
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
