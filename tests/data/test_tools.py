"""Tools, calls and what tools return: what is trained on is what the model writes, by the templates of published models."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.test_chat_templates import TEMPLATES, model_of
from tests.data.tiny import byte_tokenizer, prepare, trained_text
from tests.errors import raises
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.samples.sample_formats import read_sample
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import tokenize_rendered
from zero_sft.errors import DataError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}},
]
CITY = 'Zü"rich\n二'
ARGUMENTS = {"city": CITY, "days": 3}
JSON_CITY = json.dumps(CITY, ensure_ascii=False)


def call(name, arguments, **more):
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*calls, text=None, result="sunny"):
    """A question, calls, what they return, an answer, and a second question and answer."""
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": text, "tool_calls": list(calls)},
            *({"role": "tool", "content": result} for _ in calls),
            {"role": "assistant", "content": "It is sunny."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye."},
        ],
    }


def example_of(sample, name="qwen3", **options):
    """The sample as tokens, with the template and the special tokens of a published model."""
    tokenizer, template = model_of(name)
    _, parsed = read_sample(sample, "data.json, sample 1", ReadOptions(**options))
    (example,) = tokenize_rendered([template.render(parsed.sample)], tokenizer, 100_000)
    return tokenizer, example


def trained(sample, name="qwen3", **options):
    tokenizer, example = example_of(sample, name, **options)
    return trained_text(example, tokenizer)


def shown(sample, name="qwen3", **options):
    tokenizer, example = example_of(sample, name, **options)
    return tokenizer.decode(example.input_ids)


WEATHER = call("weather", ARGUMENTS)
XML = (
    f"<tool_call>\n<function=weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n"
    "</tool_call>"
)
CALLED = {  # template: the call as the model writes it
    "qwen2_5": f'<tool_call>\n{{"name": "weather", "arguments": {{"city": {JSON_CITY}, "days": 3}}}}\n</tool_call><|im_end|>',
    "qwen3": f'<tool_call>\n{{"name": "weather", "arguments": {{"city": {JSON_CITY}, "days": 3}}}}\n</tool_call><|im_end|>',
    "qwen3_5_think": f"{XML}<|im_end|>",
    "llama3_1": f'{{"name": "weather", "parameters": {{"city": {JSON_CITY}, "days": 3}}}}<|eot_id|>',
    "gptoss": f' to=functions.weather<|channel|>commentary json<|message|>{{"city": {JSON_CITY}, "days": 3}}<|call|>',
    "gemma4_v4": f'<|tool_call>call:weather{{city:<|"|>{CITY}<|"|>,days:3}}<tool_call|><|tool_response>',
    "nemotron_3_nano": f"{XML}\n<|im_end|>",
    "lfm2_v2": f"<|tool_call_start|>[weather(city={CITY!r}, days=3)]<|tool_call_end|><|im_end|>",
}  # fmt: skip
ENDS = {"llama3_1": "<|eot_id|>", "gptoss": "<|end|>", "gemma4_v4": "<turn|>"}


@pytest.mark.parametrize("name", CALLED)
def test_a_call_is_trained_on_as_the_model_writes_it(name):
    end = ENDS.get(name, "<|im_end|>")
    last = "<|return|>" if name == "gptoss" else end
    assert trained(chat(WEATHER), name) == [CALLED[name], f"It is sunny.{end}", f"Bye.{last}"]
    assert "sunny" in shown(chat(WEATHER), name)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "nemotron_3_nano"])
def test_several_calls_with_a_text(name):
    first, *_ = trained(chat(WEATHER, call("now", {}), text="I look."), name)
    assert first.startswith("I look.")
    assert [first.count(word) for word in ("weather", "now", JSON_CITY[1:-1] if "qwen" in name else CITY)] == [1, 1, 1]


def test_what_a_tool_returns_has_the_name_of_its_call():
    """Gemma's template finds the call by its id."""
    text = shown(chat(WEATHER, call("now", {})), "gemma4_v4")
    assert [text.count(f"response:{name}{{value") for name in ("weather", "now")] == [1, 1]


def test_a_call_that_is_the_last_turn():
    sample = {"tools": TOOLS, "messages": chat(WEATHER)["messages"][:2]}
    assert trained(sample) == [CALLED["qwen3"]]
    assert trained(sample, "gptoss") == [CALLED["gptoss"]]


@pytest.mark.parametrize(
    ("name", "sample", "code"),
    [
        ("gemma3", chat(WEATHER), "data.template_without_calls"),
        ("phi3", chat(WEATHER), "data.template_without_calls"),
        ("deepseek_r1_distill", chat(WEATHER), "data.template_without_calls"),
        ("deepseekv3", chat(WEATHER), "data.template_drops_tools"),
        ("gemma3", {**chat(), "messages": chat()["messages"][-2:]}, "data.template_drops_tools"),
        ("llama3_1", chat(WEATHER, WEATHER), "data.template_fails"),  # one call at a time
        ("llama3_1", chat(WEATHER, text="I look."), "data.template_rewrites_turns"),  # it drops the text
        (
            "gemma4_v4",
            chat(WEATHER, text="I look."),
            "data.template_changes_texts",
        ),  # it puts the text after what the tool returns
    ],
)
def test_a_template_that_drops_something_is_refused(name, sample, code):
    with raises(code, "data.json, sample 1", "--chat_template"):
        trained(sample, name)


def test_a_template_without_the_tools_takes_calls_alone():
    sample = chat(WEATHER)
    del sample["tools"]
    (first, *_) = trained(sample, "deepseekv3")
    assert JSON_CITY in first
    assert first.endswith("<｜end▁of▁sentence｜>")


def sharegpt(*turns):
    return {
        "tools": json.dumps([tool["function"] for tool in TOOLS]),
        "conversations": [{"from": a, "value": b} for a, b in turns],
    }


TEXT_CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
SHAPES = {
    "objects": chat(WEATHER),
    "arguments as text": chat(call("weather", json.dumps(ARGUMENTS))),
    "calls as text": chat(WEATHER) | {"messages": [
        {**turn, **({"tool_calls": json.dumps([WEATHER])} if "tool_calls" in turn else {})}
        for turn in chat(WEATHER)["messages"]
    ]},
    "bare calls, ids, an empty text": {"functions": [tool["function"] for tool in TOOLS], "messages": [
        {"role": "USER", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "weather", "arguments": ARGUMENTS}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "a", "name": "weather"}, *chat()["messages"][-3:],
    ]},
    "function_call": {"tools": TOOLS, "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "weather", "content": "sunny"}, *chat()["messages"][-3:],
    ]},
    "LLaMA-Factory": sharegpt(
        ("human", "Weather?"), ("function_call", TEXT_CALL), ("observation", "sunny"), ("gpt", "It is sunny."),
        ("human", "Thanks"), ("gpt", "Bye."),
    ),
    "ms-swift": {"tools": json.dumps(TOOLS), "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "tool_call", "content": TEXT_CALL},
        {"role": "tool_response", "content": "sunny"}, *chat()["messages"][-3:],
    ]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss"])
def test_every_shape_gives_the_same_tokens(shape, name):
    _, expected = example_of(SHAPES["objects"], name)
    _, example = example_of(SHAPES[shape], name)
    assert (example.input_ids, example.labels) == (expected.input_ids, expected.labels)


def test_calls_in_turns_are_one_answer():
    """Two calls in a row, after a text, as ms-swift writes them."""
    calls = [("tool_call", TEXT_CALL), ("tool_call", '{"name": "now", "arguments": {}}')]
    turns = [("user", "Weather?"), ("assistant", "I look."), *calls,
             ("tool_response", "sunny"), ("tool_response", "noon"), ("assistant", "Sunny.")]  # fmt: skip
    sample = {"tools": TOOLS, "messages": [{"role": role, "content": text} for role, text in turns]}
    expected = chat(WEATHER, call("now", {}), text="I look.")["messages"][:4]
    expected[2:] = [
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Sunny."},
    ]
    assert example_of(sample)[1] == example_of({"tools": TOOLS, "messages": expected})[1]


def test_a_parquet_file_gives_the_tokens_of_its_json(tmp_path):
    """Arrow gives every object all keys: those of other tools and other calls are null."""
    samples = [chat(WEATHER), chat(call("now", {})), {**chat(), "messages": chat()["messages"][-2:]}]
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    parquet.write_table(pyarrow.Table.from_pylist(samples), tmp_path / "data.parquet")
    row = parquet.read_table(tmp_path / "data.parquet").to_pylist()[0]
    assert row["tools"][1]["function"]["parameters"]["properties"] is None, "this is what has to be undone"
    tokenizer, _ = model_of("qwen3")
    rows = [prepare(tmp_path / name, tokenizer, model_max_length=4000).rows for name in ("data.jsonl", "data.parquet")]
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    assert rows[0]["labels"] == rows[1]["labels"]
    assert len(rows[0]) == 3


def nested(depth):
    return {} if depth == 0 else {"a": nested(depth - 1)}


BAD = {
    "data.nested_too_deep": chat(call("weather", nested(500))),
    "data.not_as_json": chat(call("weather", {"a": float("nan")})),
    "data.bad_arguments": chat(call("weather", [1])),
    "data.text_is_not_json": chat(call("weather", "{'city': 1}")),
    "data.bad_call": chat({"type": "function"}),
    "data.unknown_key_of_call": chat({**WEATHER, "weight": 0}),
    "data.bad_tools": {**chat(WEATHER), "tools": {"name": "f"}},
    "data.bad_tool": {**chat(WEATHER), "tools": [{"description": "f"}]},
    "data.tools_twice": {**chat(WEATHER), "functions": TOOLS},
    "data.calls_twice": chat(WEATHER) | {"messages": [
        chat()["messages"][0], {"role": "assistant", "tool_calls": [WEATHER], "function_call": WEATHER["function"]},
    ]},
    "data.tool_turn_without_call": {"messages": [
        *chat(WEATHER)["messages"][:3], {"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"},
    ]},
    "data.key_refused": {"messages": [{"role": "user", "content": "a", "tool_calls": [WEATHER]}, *chat()["messages"][-1:]]},
    "data.roles_do_not_alternate": {"messages": [*chat(WEATHER)["messages"][:3], *chat()["messages"][-2:]]},
}  # fmt: skip


@pytest.mark.parametrize("code", BAD)
def test_bad_tools_and_calls(code):
    with raises(code, "data.json, sample 1"):
        trained(BAD[code])


def test_ids_that_do_not_fit():
    sample = chat({**WEATHER, "id": "a"})
    sample["messages"][2]["tool_call_id"] = "b"
    with raises("data.tool_turn_without_call", "turn 3", "b", "a"):
        trained(sample)


def test_a_call_of_a_tool_that_is_not_offered_is_counted(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat(call("nowhere", {})), chat(WEATHER)]))
    tokenizer, _ = model_of("qwen3")
    lines = prepare(path, tokenizer, model_max_length=4000).lines()
    assert "1 call of a tool that is not among the sample's tools" in lines


def test_tools_that_the_system_text_has_already(tmp_path):
    """As in Hermes' data: calls in the texts, and a column of tools that repeats those of the system text."""
    system = f"You may call:\n<tools>\n{json.dumps(TOOLS)}\n</tools>"
    answer = f"<tool_call>\n{TEXT_CALL}\n</tool_call>"
    turns = [("system", system), ("human", "Weather?"), ("gpt", answer), ("tool", "sunny"), ("gpt", "Sunny.")]
    sample = {"conversations": [{"from": a, "value": b} for a, b in turns], "tools": json.dumps(TOOLS)}
    with raises("data.tools_in_system_text", "--tools ignore"):
        trained(sample)
    assert trained(sample, tools="ignore") == [f"{answer}<|im_end|>", "Sunny.<|im_end|>"]
    assert shown(sample, tools="ignore").count('"description": "The weather."') == 1
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample] * 2))
    tokenizer, _ = model_of("qwen3")
    options = {"parser": SampleParser(options=ReadOptions(tools="ignore"))}
    lines = prepare(path, tokenizer, model_max_length=4000, **options).lines()
    assert "2 samples whose `tools` are not given to the template (--tools ignore)" in lines
    assert "2 results of tools after answers without `tool_calls`; their calls are to be in the text" in lines


def test_results_that_have_the_templates_tags_already():
    """As in Hermes' data: the template writes the same tags around them."""
    plain = chat(WEATHER)
    tagged = chat(WEATHER, result="<tool_response>\nsunny\n</tool_response>")
    for name in ("qwen3", "qwen2_5"):
        assert shown(tagged, name) == shown(plain, name)
    assert "<tool_response>" in shown(tagged, "llama3_1")  # which has other tags, so the text stays


@pytest.mark.parametrize("thoughts", ["in the text", "in a field"])
def test_thoughts_before_a_turn_that_is_a_call(thoughts):
    """As LLaMA-Factory writes them."""
    text = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    call_turn = {"from": "function_call", "value": text, "reasoning_content": "I look."}
    if thoughts == "in the text":
        call_turn = {"from": "function_call", "value": f"<think>\nI look.\n</think>\n\n{text}"}
    sample = {"tools": json.dumps(TOOLS), "conversations": [
        {"from": "human", "value": "Weather?"}, call_turn, {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]}  # fmt: skip
    first, last = trained(sample)
    assert first.startswith("<think>\nI look.\n</think>\n\n<tool_call>\n{")
    assert last == "Sunny.<|im_end|>"


def test_a_key_of_openais_requests_is_a_note():
    sample = {**chat(WEATHER), "parallel_tool_calls": False}
    assert trained(sample) == trained(chat(WEATHER))


def hermes():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer, choose_template("hermes", tokenizer)


def test_the_hermes_template():
    tokenizer, template = hermes()
    for sample in (chat(WEATHER, call("now", {}), text="I look."), chat(WEATHER)):
        sample["messages"].insert(0, {"role": "system", "content": "Be brief."})
        _, parsed = read_sample(sample, "here")
        rendered = template.render(parsed.sample)
        (example,) = tokenize_rendered([rendered], tokenizer, 100_000)
        calls = [f'<tool_call>\n{{"name": "weather", "arguments": {{"city": {JSON_CITY}, "days": 3}}}}\n</tool_call>']
        if len(sample["messages"]) == 8:
            calls = ["I look.", *calls, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>']
        assert trained_text(example, tokenizer) == ["\n".join(calls) + "<|im_end|>", "It is sunny.<|im_end|>", "Bye.<|im_end|>"]
        assert json.dumps(TOOLS[0], ensure_ascii=False) in rendered.text
        assert "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>" in rendered.text


MISTRALS = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids of 9') }}{% endif %}"
    '{{ c.function | tojson }}, "id": "{{ c.id }}"{% endfor %}]</s>'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("ids", [{}, {"id": "call_1234567890"}, {"id": "abcDEF123"}])
def test_ids_of_nine_letters(ids):
    """As Mistral's templates demand them: those of the data if they fit, else others, the same for the call and its answer."""
    tokenizer = byte_tokenizer(MISTRALS)
    template = choose_template("model", tokenizer)
    _, parsed = read_sample(chat({**WEATHER, **ids}), "here")
    text = template.render(parsed.sample).text
    called = text.partition('"id": "')[2][:9]
    assert called.isalnum()
    assert text.count(called) == 2, "in the call, and in what the tool returned"
    assert (called == ids.get("id")) == (ids.get("id") == "abcDEF123")


TRL = ["qwen3", "qwen2_5", "gptoss", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano", "qwen3_instruct_2507", "lfm2_v2"]


@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("calls", [(WEATHER,), (WEATHER, call("now", {})), ()], ids=len)
def test_ids_and_masks_are_trls(name, calls):
    """TRL's templates for training, with marks around what the assistant writes."""
    if name == "gptoss" and len(calls) > 1:
        pytest.skip("one call at a time")
    tokenizer, _ = model_of(name)
    template = TEMPLATES / f"{name}_training.jinja"
    sample = chat(*calls) if calls else {**chat(), "messages": chat()["messages"][-2:]}
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in sample["messages"]]
    theirs = tokenizer.apply_chat_template(
        [{"content": "", **turn} for turn in messages], tools=TOOLS, chat_template=template.read_text(), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    _, parsed = read_sample(sample, "here")
    (ours,) = tokenize_rendered([choose_template(str(template), tokenizer).render(parsed.sample)], tokenizer, 100_000)
    assert ours.input_ids == theirs["input_ids"]
    mask = [int(label != -100) for label in ours.labels]
    assert mask == theirs["assistant_masks"], trained_text(ours, tokenizer)


def test_a_string_that_looks_like_a_mark():
    """Arguments may hold the template's marks; they are the model's text."""
    sample = chat(call("weather", {"city": "</tool_call><|im_end|>\n<|im_start|>user\n", "days": 3}))
    try:
        first, *_ = trained(sample)
    except DataError:
        return
    assert first.count("<|im_end|>") == 2


def test_variables_for_the_template(tmp_path):
    """They are given to it, and those that it does not know are counted."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sample = {"messages": turns, "chat_template_kwargs": {"reasoning_effort": "high", "depth": 3}}
    assert "Reasoning: high" in shown(sample, "gptoss")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample, {"messages": turns, "chat_template_kwargs": '{"depth": 1}'}, {"messages": turns}]))
    tokenizer, _ = model_of("gptoss")
    lines = prepare(path, tokenizer, model_max_length=4000).lines()
    assert "2 samples with `depth` in chat_template_kwargs, which the template does not use" in lines
    assert not any("reasoning_effort" in line for line in lines)
    for value in ([1], "x", {"tools": [1]}, {"add_generation_prompt": True}):
        with raises("data.bad_template_kwargs", "sample 1"):
            trained({"messages": turns, "chat_template_kwargs": value or {}})


@pytest.mark.parametrize("bad", [{"function": {"arguments": {}}}, {"name": None}, None])
def test_a_call_without_a_name(bad):
    """Not taken for an answer without calls, which would be dropped."""
    sample = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [bad]}]}
    with raises("data.bad_call", "sample 1, turn 2"):
        trained(sample)
