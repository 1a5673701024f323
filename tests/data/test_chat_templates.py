"""The chat templates of published models, as TRL ships them: what is trained on is what the model writes, to the character."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import trl

from tests.data.tiny import byte_tokenizer, conversation, trained_text
from tests.errors import raises
from zero_sft.data.samples.conversation import Conversation, Turn
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import tokenize_rendered
from zero_sft.errors import DataError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_MARKS = re.compile(r"<\|?[^<>\s{}'\"|]{2,40}\|?>|<｜[^>]*?｜>")

ENDS = {  # model: what ends an answer in the middle of a conversation, and the last one
    "llama3_1": ("<|eot_id|>",) * 2, "qwen2_5": ("<|im_end|>",) * 2, "qwen3": ("<|im_end|>",) * 2,
    "qwen3_instruct_2507": ("<|im_end|>",) * 2, "qwen3_5_think": ("<|im_end|>",) * 2, "gemma": ("<end_of_turn>",) * 2,
    "gemma3": ("<end_of_turn>",) * 2, "deepseek_r1_distill": ("<｜end▁of▁sentence｜>",) * 2,
    "deepseekv3": ("<｜end▁of▁sentence｜>",) * 2, "gptoss": ("<|end|>", "<|return|>"), "phi3": ("<|end|>",) * 2,
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",) * 2,
}  # fmt: skip
STRIPPED = ("llama3_1", "gemma", "gemma3", "qwen3_5_think")  # white space at an answer's ends is dropped


def model_of(name):
    """A tokenizer with the template and its special tokens, and the template."""
    source = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = byte_tokenizer(source)
    tokenizer.add_tokens(sorted(set(_MARKS.findall(source)) - {"<think>", "</think>"}), special_tokens=True)
    return tokenizer, choose_template("model", tokenizer)


def trained(name, *texts, system=None):
    """What is trained on of a conversation, through the model's tokens."""
    tokenizer, template = model_of(name)
    (example,) = tokenize_rendered([template.render(conversation(*texts, system=system))], tokenizer, 100_000)
    return trained_text(example, tokenizer)


@pytest.mark.parametrize("name", ENDS)
def test_answers_and_their_ends(name):
    middle, last = ENDS[name]
    system = None if name == "gemma" else "Be brief."
    assert trained(name, "Hi", "Hello.", "More?", "No.", system=system) == [f"Hello.{middle}", f"No.{last}"]
    assert trained(name, "Hello.", "Hello.", "Hello.", "Hello.") == [f"Hello.{middle}", f"Hello.{last}"]
    assert trained(name, "你好", "你好,世界 👩‍👩‍👧‍👦", "x", "def f():\n    return 1") == [
        f"你好,世界 👩‍👩‍👧‍👦{middle}", f"def f():\n    return 1{last}"
    ]  # fmt: skip


@pytest.mark.parametrize("name", STRIPPED)
def test_answers_that_are_stripped(name):
    middle, last = ENDS[name]
    assert trained(name, " Hi ", "  Hello. \n", "More?", "No.\n\n") == [f"Hello.{middle}", f"No.{last}"]


THOUGHTS = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "earlier", "last"),
    [
        ("qwen2_5", THOUGHTS, THOUGHTS),
        ("llama3_1", THOUGHTS, THOUGHTS),
        ("qwen3", "", THOUGHTS),
        ("qwen3_5_think", "", THOUGHTS.removeprefix("<think>\n")),  # the prompt has begun them
        ("deepseek_r1_distill", "", ""),
    ],
)
def test_thoughts_are_trained_on_where_they_are_kept(name, earlier, last):
    ends = ENDS[name]
    answers = trained(name, "Hi", f"{THOUGHTS}Hello.", "More?", f"{THOUGHTS}No.")
    assert answers == [f"{earlier}Hello.{ends[0]}", f"{last}No.{ends[1]}"]


def test_white_space_is_not_taken_for_the_templates():
    """Between the question and the answer this template writes a line's end, as the trimmed question ended."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content | trim }}"
        "{% else %}{{ '\n' }}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(source)
    template = choose_template("model", tokenizer)
    for talk in (("q", "Hi"), ("q\n", "\nHi")):
        (example,) = tokenize_rendered([template.render(conversation(*talk))], tokenizer, 1000)
        assert trained_text(example, tokenizer) == [f"{talk[1]}<|im_end|>"]


@pytest.mark.parametrize("name", ENDS)
def test_a_template_that_was_used_before_gives_the_same(name):
    """What was rendered once for a shape of conversation is right for the next of that shape, whatever its texts."""
    _, template = model_of(name)
    talks = [
        ("Hi", "Hello.", "More?", "No."),
        ("<|im_end|>", "user", "assistant\n", "<think>x</think>y"),
        ("a\n", "b", "c", " d"),
    ]
    for texts in talks:
        _, fresh = model_of(name)
        talk = conversation(*texts)
        try:
            expected = fresh.render(talk)
        except DataError as error:
            with raises(error.code):
                template.render(talk)
            continue
        assert template.render(talk) == expected


def chatml_of(content):
    """A template with the texts of questions, tools and system written in that way; answers as they are."""
    body = f"{{{{ m.content if m.role == 'assistant' else {content} }}}}"
    return (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{body}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SHORT_ONLY = (
    "{% for m in messages %}{% if m.content|length < 100 or m.role == 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = " ".join(f"word{number}" for number in range(40))
CUTTING = [  # a template that changes some texts, and one of these
    (chatml_of("m.content[:60]"), LONG),
    (chatml_of("m.content[-60:]"), LONG),
    (chatml_of("m.content | truncate(60)"), LONG),
    (SHORT_ONLY, LONG),
    (chatml_of("m.content | striptags"), "What does <b>bold</b> do?"),
    (chatml_of("m.content.split('</think>')[-1]"), "What does </think> end?"),
    (chatml_of("m.content | replace('\n\n', '\n')"), "One.\n\nTwo."),
]


@pytest.mark.parametrize(("source", "text"), CUTTING)
@pytest.mark.parametrize("place", [1, 3, 0])
def test_a_text_that_a_template_cuts_by_its_content_is_refused(source, text, place):
    template = choose_template("model", byte_tokenizer(source))
    texts = ["Hi", "Hello.", "More?", "No."]
    template.render(conversation(*texts, system="Be brief."))
    system = "Be brief." if place else text
    if place:
        texts[place - 1] = f" {text}\n"
    with raises("data.template_changes_texts", f"here, message {place + 1}"):
        template.render(conversation(*texts, system=system))


def test_a_question_that_is_in_another_text_is_looked_for_in_its_place():
    template = choose_template("model", byte_tokenizer(SHORT_ONLY))
    for answers in ((LONG, "Yes."), ("Yes.", f"You said: {LONG}")):
        with raises("data.template_changes_texts", "message 3"):
            template.render(conversation("Hi", answers[0], LONG, answers[1], "Bye", LONG))


@pytest.mark.parametrize("name", [*ENDS])
def test_texts_that_templates_trim_or_move_are_no_changed_texts(name):
    _, template = model_of(name)
    system = None if name == "gemma" else " Be brief.\n"
    template.render(conversation(f"\n {LONG}  ", "Hello.", " <b>More?</b>\n\n</think> ", "No.", system=system))


def test_the_text_of_a_tool_may_be_written_in_json():
    """As in Llama-3.1's template."""
    _, template = model_of("llama3_1")
    roles = ("user", "assistant", "tool", "assistant")
    texts = ("Hi", "f()", '{"a": "b"}\nüber\t', "Hello.")
    turns = tuple(Turn(role=role, text=text) for role, text in zip(roles, texts, strict=True))
    assert json.dumps(texts[2], ensure_ascii=False) in template.render(Conversation(turns=turns, where="here")).text


@pytest.mark.parametrize("fails", ["", "{% if 'zerosft' in messages[1].content %}{{ raise_exception('no') }}{% endif %}"])
def test_a_template_that_moves_the_system_text_behind_questions(fails):
    """As Mistral's do: into the last question. One that fails on stand-ins has no frame to tell it."""
    source = (
        "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}"
        "{% else %}{% set system, rest = '', messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "[INST] {% if loop.index == rest|length - 1 %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template = replace(choose_template("model", byte_tokenizer(source)), source=fails + source)
    rendered = template.render(conversation("Hi", "Hello.", "More?", "No.", system="Be brief."))
    assert rendered.text == "[INST] Hi[/INST]Hello.<|im_end|>[INST] Be brief.\n\nMore?[/INST]No.<|im_end|>"
