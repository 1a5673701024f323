"""Thoughts in the text of an answer: given to templates that take them from a field, kept, refused, or counted as dropped."""

import json
from pathlib import Path

import pytest
import trl

from tests.data.tiny import CHATML, byte_tokenizer, conversation, prepare
from tests.data.tiny import trained_text as trained_tokens
from tests.errors import raises
from zero_sft.data.samples.parse import DEFAULT_PARSER
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.templates.named import HERMES
from zero_sft.data.tokenize import tokenize_rendered

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# As Qwen3.8's: thoughts come from a field alone, and a block of them, if an empty one, stands before every answer.
FIELD_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.NAME | default('', true) }}"
    "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LAST_ALONE = FIELD_ALONE.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
BLOCK_OF_ITS_OWN = FIELD_ALONE.replace("{{ m.NAME | default('', true) }}", "")
FORGETTING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")  # as DeepSeek-R1's
NAMES = ("reasoning_content", "reasoning", "thinking")


def tokenizer_of(template):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(["<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"], special_tokens=True)
    return tokenizer


def rendered_and_trained(template, *texts):
    tokenizer = tokenizer_of(template)
    rendered = choose_template("model", tokenizer).render(conversation(*texts))
    (example,) = tokenize_rendered([rendered], tokenizer, 100_000)
    return rendered, trained_tokens(example, tokenizer)


def by_hand(template, *answers):
    """The template's own rendering with the thoughts in its field."""
    messages = []
    for question, (field, thoughts, text) in answers:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text, field: thoughts}]
    return tokenizer_of(template).apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nhm\n\nso\n</think>\n\nHello.",
        " <think>hm\n\nso</think>Hello.",
        "hm\n\nso\n</think>\n\nHello.",
        "hm\n\nso\n</think>\nHello.",
    ],
)
def test_thoughts_move_into_the_field_that_the_template_reads(name, answer):
    template = FIELD_ALONE.replace("NAME", name)
    rendered, trained = rendered_and_trained(template, "Hi", answer, "More?", "<think>x</think>No.", "Why?", "So.")
    expected = [("Hi", (name, "hm\n\nso", "Hello.")), ("More?", (name, "x", "No.")), ("Why?", (name, "", "So."))]
    assert rendered.text == by_hand(template, *expected)
    assert trained == ["hm\n\nso\n</think>\n\nHello.<|im_end|>", "x\n</think>\n\nNo.<|im_end|>", "So.<|im_end|>"]
    assert (rendered.thoughts, rendered.dropped_thoughts) == (2, 0)


def test_thoughts_that_stand_in_the_question_too():
    name, template = NAMES[0], FIELD_ALONE.replace("NAME", NAMES[0])
    question = "<|im_start|>assistant\n<think>\nuser"
    rendered, trained = rendered_and_trained(template, question, "<think>user</think>Hello.")
    assert rendered.text == by_hand(template, (question, (name, "user", "Hello.")))
    assert trained == ["user\n</think>\n\nHello.<|im_end|>"]


def test_an_empty_block_in_the_text_is_the_templates():
    name, template = NAMES[0], FIELD_ALONE.replace("NAME", NAMES[0])
    rendered, trained = rendered_and_trained(template, "Hi", "<think>\n\n</think>\n\nHello.")
    assert rendered.text == by_hand(template, ("Hi", (name, "", "Hello.")))
    assert trained == ["Hello.<|im_end|>"]
    assert rendered_and_trained(BLOCK_OF_ITS_OWN, "Hi", "<think>\n\n</think>\n\nHello.")[1] == trained


def test_gpt_oss_takes_thoughts_to_its_channel():
    template = (TEMPLATES / "gptoss.jinja").read_text()
    rendered, trained = rendered_and_trained(template, "Hi", "<think>hm</think>Hello.")
    assert "<|channel|>analysis<|message|>hm<|end|>" in rendered.text
    assert trained == ["<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>"]


@pytest.mark.parametrize(
    "template", [FIELD_ALONE.replace("NAME", "reasoning_content"), BLOCK_OF_ITS_OWN, FORGETTING, "qwen3", "qwen3_5_think"]
)
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("<think>\nhm", "data.thoughts_not_closed"),
        (" <think>", "data.thoughts_not_closed"),
        ("Sure. <think>hm</think> Hello.", "data.thoughts_in_text"),
        ("<think>a</think>b<think>c</think>d", "data.thoughts_in_text"),
        ("the tag </think> closes", "data.thoughts_in_text"),
    ],
)
def test_tags_that_do_not_tell_what_is_thought_are_refused(template, answer, code):
    source = template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text()
    with raises(code, "here, message 2", "</think>"):
        rendered_and_trained(source, "Hi", answer, "More?", "No.")


def test_a_block_that_the_template_writes_itself_takes_no_thoughts():
    with raises("data.template_takes_no_thoughts", "message 2", "</think>"):
        rendered_and_trained(BLOCK_OF_ITS_OWN, "Hi", "<think>hm</think>Hello.")


@pytest.mark.parametrize("answer", ["<think>\nhm", "hm\n</think>\n\nHello.", "Sure. <think>hm</think> Hello."])
def test_where_tags_are_text_like_any_other_they_are_trained_on(answer):
    assert rendered_and_trained(CHATML, "Hi", answer)[1] == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        (FORGETTING, 3), ("deepseek_r1_distill", 3), ("qwen3", 2), ("qwen3_5_think", 2), (CHATML, 0), ("qwen2_5", 0),
        (FIELD_ALONE.replace("NAME", "reasoning"), 0), (LAST_ALONE.replace("NAME", "reasoning"), 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_thoughts_that_the_template_leaves_out_are_counted(template, dropped, opening):
    source = template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text()
    answers = [f"{opening}thought {number}\n</think>\n\nHello." for number in range(3)]
    if not opening and dropped == 0 and "reasoning" not in source:
        pytest.skip("text like any other")
    rendered, trained = rendered_and_trained(source, "Hi", answers[0], "a", answers[1], "b", "No.", "c", answers[2])
    assert (rendered.thoughts, rendered.dropped_thoughts) == (3, dropped)
    assert rendered.text.count("thought ") == sum(text.count("thought ") for text in trained) == 3 - dropped


@pytest.mark.parametrize("lazy", [False, True])
def test_dropped_thoughts_are_said_in_the_log(tmp_path, lazy):
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<think>hm</think>Hello."}]
    path.write_text(
        json.dumps([{"conversations": turns}, {"conversations": [*turns, turns[0], {"from": "gpt", "value": "No."}]}])
    )
    prepared = prepare(path, byte_tokenizer(FORGETTING), model_max_length=500, lazy=lazy)
    log = "\n".join(prepared.lines())
    if lazy:
        assert "which thoughts the template leaves out, is not known" in log
        return
    assert "the template leaves out the thoughts of 2 answers, of 2 that have some" in log
    assert "leaves out the thoughts of all 2 answers that have some" in prepared.warnings()[0]
    assert not prepare(path, byte_tokenizer(CHATML), model_max_length=500).warnings()


@pytest.mark.parametrize("template", ["vicuna", "model"])
def test_an_answer_of_white_space_is_counted_as_an_empty_one(tmp_path, template):
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " \n"}]
    fine = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    path.write_text(json.dumps([{"conversations": [*turns, *fine]}, {"conversations": turns}, {"conversations": fine}]))
    prepared = prepare(path, byte_tokenizer(CHATML), chat_template=template, model_max_length=500)
    (report,) = prepared.reports
    if template == "vicuna":  # FastChat trains on it
        assert (report.kept, report.empty_answers, report.dropped) == (3, 0, {})
    else:
        assert (report.kept, report.empty_answers, report.dropped) == (2, 1, {"without an answer to train on": 1})


def test_thoughts_before_a_call_alone_are_counted_as_kept():
    """In the text of an answer that has no other text, but a call."""
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    tool = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}}
    sample = {"tools": [tool], "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>\nI look.\n</think>", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Noon."},
    ]}  # fmt: skip
    tokenizer = byte_tokenizer(HERMES)
    (parsed,) = DEFAULT_PARSER.read([(sample, "data.json, sample 1")]).samples
    rendered = choose_template(None, tokenizer).render(parsed)
    assert (rendered.thoughts, rendered.dropped_thoughts) == (1, 0)
    assert rendered.text[slice(*rendered.spans[0])].startswith("<think>\nI look.\n</think>\n<tool_call>")
