"""Long conversations: split between rounds as well as can be, in an amount of work that grows with the tokens alone."""

import collections
import json
import random
import sys

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, make_pipeline
from tests.slow import slow
from zero_sft.data import pipeline as pipeline_module
from zero_sft.data.samples.parse import DEFAULT_PARSER
from zero_sft.data.templates.choose import choose_template

THINKING = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] | trim }}"
)
TOOLS = CHATML.replace("{{ m.content }}", "{{ m.content | trim if m.role == 'tool' else m.content }}")


def part_of(turns, *, template=CHATML, name="model", window=200, long="split"):
    tokenizer = byte_tokenizer(template)
    pipeline = make_pipeline(tokenizer, chat_template=name, model_max_length=window, overlong=long)
    return pipeline.make_rows([({"messages": turns}, "here")]), tokenizer


def talk(rounds):
    return [
        {"role": role, "content": text} for texts in rounds for role, text in zip(("user", "assistant"), texts, strict=True)
    ]


def greedy(rounds, tokenizer, name, window, system):
    """By trying: to each part a round is added as long as it fits."""
    template, head = choose_template(name, tokenizer), [{"role": "system", "content": system}] if system else []

    def length(part):
        (sample,) = DEFAULT_PARSER.read([({"messages": head + talk(part)}, "here")]).samples
        rendered = template.render(sample)
        return len(tokenizer(rendered.text, add_special_tokens=rendered.adds_special_tokens).input_ids)

    parts = []
    for each in rounds:
        if parts and length([*parts[-1], each]) <= window:
            parts[-1].append(each)
        else:
            parts.append([each])
    return [min(length(part), window) for part in parts]


@pytest.mark.parametrize("system", ["", "Be brief, please, and kind."])
@pytest.mark.parametrize(("template", "name"), [(CHATML, "model"), (CHATML, "vicuna"), (THINKING, "model")])
def test_each_part_has_as_many_rounds_as_fit(template, name, system):
    rng = random.Random(5)
    window = 420 if name == "vicuna" else 200
    for _ in range(12):
        thoughts = "<think>{}</think>" if template == THINKING else "{}"
        rounds = [
            ("q" * rng.randint(1, 60), thoughts.format("t" * rng.randint(1, 9)) + "a" * rng.choice((1, 20, 90, 300)))
            for _ in range(rng.randint(2, 30))
        ]
        turns = ([{"role": "system", "content": system}] if system else []) + talk(rounds)
        part, tokenizer = part_of(turns, template=template, name=name, window=window)
        assert part.rows.column("length").to_pylist() == greedy(rounds, tokenizer, name, window, system)


def test_rounds_of_tools_and_of_answers_that_are_not_trained_on():
    """Some rounds have no answer with a text, some several."""
    more = [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "b" * 30, "train": False}]
    turns = []
    for number in range(40):
        turns += talk([(f"question {number}", "" if number % 3 == 0 else "a" * 30)]) + (more if number % 4 == 0 else [])
    part, tokenizer = part_of(turns, template=TOOLS)
    texts = [tokenizer.decode(ids) for ids in part.rows.column("input_ids").to_pylist()]
    assert [number for number in range(40) if sum(f"question {number}<" in text for text in texts) != 1] == []
    assert max(part.rows.column("length").to_pylist()) <= 200
    assert part.report.kept < 30


@pytest.mark.parametrize("name", ["model", "vicuna"])
def test_the_work_of_splitting_grows_with_the_tokens(monkeypatch, name):
    """What is tokenised to find the parts is a few times the conversation, however small a round is against the window."""
    seen = collections.Counter()
    real = pipeline_module.tokenize_rendered

    def counting(rendered, *rest):
        seen["characters"] += sum(len(each.text) for each in rendered)
        return real(rendered, *rest)

    monkeypatch.setattr(pipeline_module, "tokenize_rendered", counting)
    rng = random.Random(1)
    turns = talk([("q" * rng.randint(1, 20), "a" * rng.randint(1, 20)) for _ in range(3000)])
    part_of(turns, name=name, window=10**7)
    whole = seen["characters"]
    part, _ = part_of(turns, name=name, window=4000)
    assert part.report.kept > 10
    assert seen["characters"] - whole < 4 * whole


def calls_of(turns, **options):
    """How many functions are called, Python's and C's."""
    count = 0

    def called(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        part_of(turns, **options)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("long", ["truncate", slow("split")])
@pytest.mark.parametrize("name", ["model", "vicuna"])
def test_calls_grow_with_the_turns(name, long):
    sizes = [calls_of(talk([("Hi", "Hello.")] * count), name=name, long=long, window=600) for count in (500, 2000, 8000)]
    assert sizes[2] - sizes[1] < 1.2 * 4 * (sizes[1] - sizes[0]), json.dumps(sizes)
