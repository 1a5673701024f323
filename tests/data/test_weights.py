"""Weights of samples and turns, and parts of an answer that are not trained on."""

import json

import pytest

from tests.data.test_chat_templates import model_of
from tests.data.tiny import CHATML, byte_tokenizer, make_pipeline, prepare, trained_text, word_tokenizer
from tests.errors import raises
from zero_sft.data.samples.sample_formats import read_sample
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import WEIGHTS, tokenize_rendered

TEXT = "Hello you. Bye."


def chat(**marks):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TEXT, **marks}]}


def ranges(*parts):
    """axolotl's marks: the last character is included."""
    return {"train_detail": [{"begin_offset": first, "end_offset": last, "train": train} for first, last, train in parts]}


def example_of(sample, tokenizer, template="model"):
    _, parsed = read_sample(sample, "here")
    (example,) = tokenize_rendered([choose_template(template, tokenizer).render(parsed.sample)], tokenizer, 1000)
    return example


def trained(sample, tokenizer=None, template="model"):
    tokenizer = tokenizer or byte_tokenizer(CHATML)
    return trained_text(example_of(sample, tokenizer, template), tokenizer)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([(0, 4, True)], ["Hello", "<|im_end|>"]),
        ([(0, 4, False), (5, 14, True)], [" you. Bye.<|im_end|>"]),
        ([(0, 9, True), (10, 14, False)], ["Hello you.", "<|im_end|>"]),
        ([(0, 4, True), (5, 5, False), (6, 8, True)], ["Hello", "you", "<|im_end|>"]),
        ([(0, 14, True)], [f"{TEXT}<|im_end|>"]),
    ],
)
def test_ranges_of_an_answer(marks, expected):
    """Whatever no range covers is left out; the end is trained on, since the model has to learn to stop."""
    assert trained(chat(**ranges(*marks))) == expected
    vicuna = [text.replace("<|im_end|>", "</s>") for text in expected]
    assert trained(chat(**ranges(*marks)), template="vicuna") == vicuna


def test_nothing_of_an_answer(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat(**ranges((0, 14, False)))]))
    with raises("data.nothing_left"):
        prepare(path, byte_tokenizer(CHATML), model_max_length=100)


def test_a_token_that_is_in_a_range_only_in_part():
    """It is left out: it holds text that is not to be trained on."""
    tokenizer = word_tokenizer(["\u2581Hello", "\u2581you.", "\u2581Bye.", "\u2581ASSISTANT:", "\u2581USER:", "\u2581Hi"], None)
    example = example_of(chat(**ranges((0, 6, True), (11, 14, True))), tokenizer, "vicuna")
    assert [tokenizer.decode([label]) for label in example.labels if label != -100] == ["</s>"]


def test_stripped_answers():
    """Llama-3.1's template strips texts; the offsets are those of the data."""
    tokenizer, _ = model_of("llama3_1")
    sample = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"  {TEXT}\n", **ranges((2, 6, True))}]
    }
    assert trained(sample, tokenizer) == ["Hello", "<|eot_id|>"]


def test_ranges_next_to_thoughts():
    tokenizer, _ = model_of("qwen3")
    with raises("data.ranges_next_to_thoughts", "message 2"):
        trained(chat(reasoning_content="hm", **ranges((0, 4, True))), tokenizer)


def test_a_question():
    sample = {"messages": [{"role": "user", "content": "Hi", **ranges((0, 1, True))}, chat()["messages"][1]]}
    with raises("data.only_answers_are_trained_on", "turn 1", "train_detail"):
        trained(sample)
    sample["messages"][0] |= ranges((0, 1, False))
    assert trained(sample) == [f"{TEXT}<|im_end|>"]


@pytest.mark.parametrize(
    ("sample", "weight"),
    [
        (chat(weight=0.5), 0.5), (chat(loss_scale="0.25"), 0.25), (chat(weight=0.5, train=True), 0.5),
        ({**chat(), "weight": 0.5}, 0.5), ({**chat(weight=0.5), "weight": 0.5}, 0.25), (chat(weight=1, loss_scale=0.5), 0.5),
        ({"prompt": "Hi", "completion": TEXT, "weight": 0.5}, 0.5), ({"text": TEXT, "weight": "0.5"}, 0.5),
    ],
)  # fmt: skip
def test_weights(sample, weight):
    tokenizer = byte_tokenizer(CHATML)
    for lazy in (False, True):
        pipeline = make_pipeline(tokenizer, model_max_length=100, lazy=lazy)
        batch = pipeline.make_rows([(sample, "here")])
        row = pipeline(batch.rows.to_pydict()) if lazy else batch.rows.to_pydict()
        assert [bool(each) for each in row[WEIGHTS][0]] == [label != -100 for label in row["labels"][0]]
        assert {each for each in row[WEIGHTS][0] if each} == {weight}


def test_a_weight_of_0_drops_the_sample(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat(), {**chat(), "weight": 0}, {"text": "a", "weight": 0}]))
    prepared = prepare(path, byte_tokenizer(CHATML), model_max_length=100)
    assert len(prepared.rows) == 1
    assert "samples dropped: 2 without an answer to train on" in prepared.lines()


@pytest.mark.parametrize("weight", [2, -1, "half", [1]])
def test_bad_weights(weight):
    with raises("data.bad_value_of_key", "from 0 to 1"):
        read_sample({**chat(), "weight": weight}, "here")
